"""What a recipe of several folds has done so far, kept beside the folds, so that a run that was killed goes on."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.ownership import has_contents
from ..checkpoint.staging import write_json
from ..core.errors import UserError
from ..core.json_input import read_object
from ..core.records import record

FILE = "run.json"


@dataclass(frozen=True, slots=True)
class FoldFacts:
    """The facts of a finished fold."""

    num_kv_heads_least: int
    num_kv_heads_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    seconds: float
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Row:
    """One fold of a recipe, and how it was measured beside the model; without an evaluation that is left out."""

    name: str
    """Name of its directory; empty where the fold is the whole output."""
    fold: FoldFacts
    metric: str | None = None
    value: float | None = None
    original: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class _Written:
    """What the file holds."""

    begun: list[str]
    done: dict[str, FoldFacts]


def finished_folds(out: Path) -> list[Path]:
    """Return the directories of the folds that a run has finished in `out`, in the order of its recipe.

    Raises:
        UserError: its file is none of this version, or names what is no directory in `out`.
    """
    file = out / FILE
    advice = "name a folder that headfold run wrote"
    found = [out / name for name in record(_Written, read_object(file, advice), str(file), advice).done]
    for path in found:
        if path.parent != out or path.name in ("", "..") or not path.is_dir():
            raise UserError(
                f"{file}: expected a directory beside it for each fold, found none for {path.name!r:.60}; {advice}"
            )
    return found


@dataclass(frozen=True, slots=True)
class Steps:
    """The folds of one run that are begun or done."""

    out: Path
    facts: Mapping[str, Any]
    """What decides the output."""
    begun: Sequence[str] = ()
    """Names of folds whose directories are this run's to replace."""
    done: Mapping[str, FoldFacts] = field(default_factory=dict)
    """The finished folds, by name."""

    @classmethod
    def opened(cls, out: Path, facts: Mapping[str, Any], force: bool) -> "Steps":
        """Return what an earlier run of the same recipe has done in a directory; nothing in an empty one.

        Raises:
            UserError: other files, or the output of another recipe, lie there and `force` is not given.
        """
        file = out / FILE
        if force:
            return cls(out, facts)
        if not file.exists():
            if has_contents(out):
                raise UserError(
                    f"{out}: expected the output of this recipe or nothing, got other files; choose another"
                )
            return cls(out, facts)
        with suppress(UserError):
            found = read_object(file)
            kept = record(_Written, found, str(file), "start over with --force")
            if found.get("recipe") == json.loads(json.dumps(facts)):
                there = {name: one for name, one in kept.done.items() if (out / name).is_dir()}
                return cls(out, facts, kept.begun, there)
        raise UserError(
            f"{file}: expected the output of this recipe, of the same model and files, got another; choose another directory, or --force "
            "to start over"
        )

    def begin(self, name: str) -> "Steps":
        """Return the steps with a fold that is about to be made, after writing them down."""
        return self._written(replace(self, begun=[*self.begun, name]))

    def finish(self, name: str, result: FoldFacts) -> "Steps":
        """Return the steps with a fold that is whole, after writing them down."""
        return self._written(replace(self, done={**self.done, name: result}))

    def _written(self, steps: "Steps") -> "Steps":
        done = {name: asdict(one) for name, one in steps.done.items()}
        write_json(steps.out / FILE, {"recipe": steps.facts, "begun": [*steps.begun], "done": done})
        return steps
