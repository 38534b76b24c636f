"""What a recipe says: a model, how it is folded, once or several ways, and what is done with the folds."""

import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from ..core.errors import UserError, suggest
from ..core.files import file_digest
from .yaml_input import Entry, read_mapping

NAME = "headfold.yaml"
"""Name of the recipe that lies beside every fold."""
_PARTS = (
    "headfold", "model", "adapter", "trust_remote_code", "code_digest", "source", "every", "fold", "folds", "eval", "report",
)  # fmt: skip
_OF_A_RUN = (
    "model", "out", "adapter", "reference", "compare", "force", "device", "push_to_hub", "progress", "say", "tokenizer",
    "trust_remote_code",
)  # fmt: skip
"""Options of a verb that a recipe gives elsewhere, that belong to a run, or that only a program can give."""
_TASKS = ("task", "num_fewshot", "include_path")
"""Options of an evaluation on tasks, whose files may hold code: a recipe runs none."""
_FILES = ("calibration", "stats", "text")
"""Options that may name a file, whose contents then decide the output too."""


@dataclass(frozen=True, slots=True)
class FoldStep:
    """One fold of a recipe."""

    name: str
    """Name of its directory; empty where the fold is the whole output."""
    options: Mapping[str, Any]
    line: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that has been read and checked."""

    path: Path
    model: str
    folds: tuple[FoldStep, ...]
    adapter: str | None = None
    """A LoRA adapter that is merged into the model first."""
    version: str = ""
    """The version of headfold that wrote it; empty for one that was written by hand."""
    source: str = ""
    """Fingerprint that the model must have; empty for any."""
    code: str = ""
    """Digest that the code must have which the model brings and the user trusts; empty for any."""
    evaluation: Mapping[str, Any] | None = None
    """Options of the evaluation of every fold beside the model; None where there is none."""
    evaluation_line: int = 0
    report: bool = False
    report_line: int = 0
    model_line: int = 0

    @property
    def is_single(self) -> bool:
        """Whether the output is one fold."""
        return len(self.folds) == 1 and not self.folds[0].name

    @contextmanager
    def at(self, line: int, name: str = "") -> Iterator[None]:
        """Return a context in which errors begin with a line of the recipe, unless it is 0, and the name of a fold."""
        try:
            yield
        except UserError as error:
            where = f"{self.path}:{line}: " if line else ""
            raise type(error)(f"{where}{name and f'{name}: '}{error}") from error

    def check_source(self, name: str, source: str, code: str) -> None:
        """Check the fingerprint of a model that goes by this name, and the digest of its code, which is empty where none is run.

        Raises:
            UserError: the recipe was made of another model, or of one with other code.
        """
        if self.source not in ("", source):
            raise UserError(
                f"{name}: expected the model that the recipe was made of, got another; pass it with --model"
            )
        if self.code not in ("", code):
            raise UserError(
                f"{name}: expected the code that the recipe was made with, of digest {self.code:.19}, got {code or 'none':.19}; "
                "pass the model with that code (--model), or remove the line code_digest from the recipe"
            )

    def plan_of(self, step: FoldStep) -> str | None:
        """Return the path of a fold's plan: beside the recipe, where a fold keeps its own, or as it is written; None without a plan."""
        if (name := step.options.get("plan")) is None:
            return None
        beside = self.path.parent / name
        return str(beside) if beside.is_file() else str(name)

    def _digests(self) -> dict[str, str | None]:
        """Return the digest of every file that an option names, by its name."""
        every = [*(step.options for step in self.folds), self.evaluation or {}]
        named = {str(options[name]) for options in every for name in _FILES if name in options}
        plans = {plan for step in self.folds if (plan := self.plan_of(step)) is not None}
        return {name: file_digest(name) for name in sorted(named | plans)}

    def facts(self) -> dict[str, Any]:
        """Return what decides the output beside the model, as JSON."""
        return {
            "folds": {step.name: dict(step.options) for step in self.folds},
            "files": self._digests(),
            "eval": None if self.evaluation is None else dict(self.evaluation),
            "report": self.report,
        }


def read_recipe(path: Path, fold: Callable[..., Any], evaluate: Callable[..., Any]) -> Recipe:
    """Return the recipe in a YAML file. The options that it may give are those of the functions `fold` and `evaluate`.

    Raises:
        UserError: with the line, an unknown or a missing name, or a value of another type than the option has.
    """
    entries = read_mapping(path)
    _refuse_unknown(path, entries, _PARTS, "a recipe has no such part")
    if "model" not in entries:
        raise UserError(f"{path}: model: expected a checkpoint directory or a hub id, got none; add model: my-model")
    if ("fold" in entries) == ("folds" in entries):
        got = "both" if "fold" in entries else "neither"
        raise UserError(
            f"{path}: expected either fold, with options, or folds, with a name before the options of each, got {got}; give one"
        )
    texts = {
        name: _typed(path, name, entries[name], str)
        for name in ("headfold", "model", "adapter", "source", "code_digest")
        if name in entries
    }
    if "trust_remote_code" in entries:  # a record of what was run, and no consent: that is given with the call
        _typed(path, "trust_remote_code", entries["trust_remote_code"], bool)
    known = _options(fold)
    shared = _checked(path, "every", entries["every"], known) if "every" in entries else {}
    if "fold" in entries:
        steps = [_step(path, "", entries["fold"], shared, known)]
    else:
        named = _typed(path, "folds", entries["folds"], dict)
        steps = [_step(path, name, entry, shared, known) for name, entry in named.items()]
    if not steps:
        raise UserError(
            f"{path}:{entries['folds'].line}: folds: expected a fold, such as half: {{kv_heads: 1/2}}, got none"
        )
    for name in ("eval", "report"):
        if name in entries and "fold" in entries:
            raise UserError(
                f"{path}:{entries[name].line}: {name}: expected folds with names, beside which it can lie, got one fold; write "
                "folds: with a name before the options"
            )
    lines = {name: entries[name].line if name in entries else 0 for name in ("eval", "report", "model")}
    return Recipe(
        path, texts["model"], tuple(steps), texts.get("adapter"), texts.get("headfold", ""), texts.get("source", ""),
        texts.get("code_digest", ""),
        _checked(path, "eval", entries["eval"], _options(evaluate)) if "eval" in entries else None, lines["eval"],
        _typed(path, "report", entries["report"], bool) if "report" in entries else False, lines["report"], lines["model"],
    )  # fmt: skip


def _step(
    path: Path, name: str, entry: Entry, shared: Mapping[str, Any], known: Mapping[str, inspect.Parameter]
) -> FoldStep:
    if name and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"{path}:{entry.line}: {name}: expected a name for a directory, got a path; leave out the rest")
    own = _checked(path, name or "fold", entry, known)
    # One of the two says how many heads there are, so a fold that has one does not take the other from all.
    counts = {"kv_heads", "plan"}
    taken = {key: value for key, value in shared.items() if not (key in counts and counts & own.keys())}
    return FoldStep(name, {**taken, **own}, entry.line)


def _options(verb: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(verb).parameters.items() if name not in (*_OF_A_RUN, *_TASKS)}


def _checked(path: Path, what: str, entry: Entry, known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return options by name; one that is given as None is as if it were not there."""
    entries = {} if entry.value is None else _typed(path, what, entry, dict)
    for name in (name for name in _TASKS if name in entries):
        raise UserError(
            f"{path}:{entries[name].line}: {name}: expected options of a fold or of data, got one of tasks, whose files may hold code; "
            "leave it out, and run headfold eval --task on each fold"
        )
    _refuse_unknown(path, entries, known, f"no such option of {what}")
    found = {}
    for name, one in entries.items():
        if one.value is not None:
            _refuse_type(path, name, one, known[name].annotation)
            found[name] = one.value
    return found


def _refuse_unknown(path: Path, entries: Mapping[str, Entry], known: Collection[str], said: str) -> None:
    for name, entry in entries.items():
        if name not in known:
            raise UserError(f"{path}:{entry.line}: {name}: {said}; {suggest(name, known)}")


def _typed(path: Path, name: str, entry: Entry, expected: type) -> Any:
    words = {str: "text", bool: "true or false", dict: "a mapping of options"}
    if not isinstance(entry.value, expected):
        raise UserError(
            f"{path}:{entry.line}: {name}: expected {words[expected]}, got {_shown(entry.value)}; correct it"
        )
    return entry.value


def _refuse_type(path: Path, name: str, entry: Entry, annotation: Any) -> None:
    """Refuse a value that the option cannot take by its annotation.

    Raises:
        UserError: names the line, and the types that it takes.
    """
    kinds = _kinds(annotation)
    fits = type(entry.value) in kinds or (type(entry.value) is int and float in kinds)
    if not fits or (isinstance(entry.value, list) and not all(isinstance(item, str) for item in entry.value)):
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list of texts"}
        expected = " or ".join(words[kind] for kind in words if kind in kinds)
        raise UserError(f"{path}:{entry.line}: {name}: expected {expected}, got {_shown(entry.value)}; correct it")


def _kinds(annotation: Any) -> set[type]:
    """Return the types of plain values that an annotation allows."""
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for one in get_args(annotation) for kind in _kinds(one)}
    if annotation is Path:
        return {str}
    if annotation in (str, int, float, bool):
        return {annotation}
    return {list} if get_origin(annotation) is not None else set()


def _shown(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "nothing" if value is None else f"{value!r:.60}"


def recipe_text(model: str, source: str, version: str, options: Mapping[str, Any], code: str | None = None) -> str:
    """Return the recipe of one fold: `headfold run` makes the same bytes of it. `code` is the digest of the code that was run."""
    import yaml

    options = dict(options)
    named = {"model": model, **({"adapter": options.pop("adapter")} if "adapter" in options else {})}
    # A path of this machine says nothing elsewhere, and a card has none either.
    short = {key: Path(name).name if Path(name).is_absolute() else name for key, name in named.items()}
    ran_code = {key: options.pop(key) for key in ("trust_remote_code",) if key in options}
    ran_code |= {"code_digest": code} if code else {}
    parts = {"headfold": version, **short, **ran_code, "source": source, "fold": options}
    written = yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, width=1000)
    return f"# headfold run {NAME} OUT{' --trust-remote-code' if ran_code else ''} repeats this fold.\n{written}"
