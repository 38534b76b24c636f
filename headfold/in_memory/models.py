"""Models in memory: written to a directory as long as a verb runs, and a fold opened as the model was that it was made of."""

import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload, runtime_checkable

import torch

from ..checkpoint.cards import CARD
from ..checkpoint.config import CONFIG
from ..checkpoint.disk import disk_errors, sizes
from ..checkpoint.hub import NamedDirectory, cached
from ..checkpoint.staging import copy_file, copy_side_files
from ..conversion.fold_result import FoldResult
from ..core.errors import UserError
from ..hf_models.building import library_errors, quiet
from ..outputs import KEPT
from ..parallel import is_main, on_all, on_main, spmd
from ..runtime.load import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")

_SAVED = ("dtype", "architectures")
"""Fields of a model's config that saving it sets."""
_OWN_CHOICE = (None, "sdpa", "headfold")
"""Attention implementations that say nothing of what the user prefers: transformers' default, and ours."""


@runtime_checkable
class FoldVerb(Protocol):
    """`fold`, whose result depends on what it is given."""

    @overload
    def __call__(self, model: "str | Path | PreTrainedModel", out: str | Path, *, to: str, **options: Any) -> Any: ...
    @overload
    def __call__(self, model: str | Path, out: str | Path, **options: Any) -> FoldResult: ...
    @overload
    def __call__(self, model: "PreTrainedModel", out: str | Path, **options: Any) -> FoldResult: ...
    @overload
    def __call__(self, model: "PreTrainedModel", out: None = None, **options: Any) -> "PreTrainedModel": ...


def folds_in_memory(verb: Callable[..., Any]) -> FoldVerb:
    """Decorate `fold`, so that it takes a model in memory too, and without `out` returns the grouped model, which holds the
    `FoldResult` under the name `headfold`. All launched processes run it together.
    """

    @wraps(verb)
    def run(model: Any, out: str | Path | None = None, **options: Any) -> Any:
        if not _is_given(model):
            if out is None:
                raise UserError(
                    f"fold {model}: expected an output directory, got none; give one, as a fold of a directory is a directory"
                )
            _refuse_tokenizer(options)
            return verb(model, out, **options)
        if out is None and options.get("push_to_hub") is not None:
            raise UserError(
                "fold: push_to_hub uploads the directory that is written; give out as well, or call push_to_hub of the result"
            )
        if out is None and "disk" in _device_map(model).values():
            raise UserError("fold: a model of which a part lies on disk cannot be returned the same way; give out")
        with _place() as place:
            (written,) = _written([model], place, options, copies=1 if out is not None else 2)
            result = verb(written, place.path / "fold" if out is None else out, **options)
            if out is not None:
                return result
            trusted = bool(options.get("trust_remote_code"))
            folded: Any = on_all(lambda: _opened_like(model, place.path / "fold", trusted))
            folded.headfold = replace(result, out=None, base_model=_origin(model))
            return folded

    return cast(FoldVerb, spmd(run))


def takes_models(*names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a verb, so that its arguments of these names may be models in memory, or sequences with some."""

    def decorated(verb: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(verb)

        @wraps(verb)
        def run(*arguments: P.args, **keywords: P.kwargs) -> T:
            options = signature.bind(*arguments, **keywords).arguments
            found = [each for name in names for each in _listed(options.get(name)) if _is_given(each)]
            if not found:
                _refuse_tokenizer(options)
                return verb(*arguments, **keywords)
            with _place() as place:
                known = dict(zip(map(id, found), _written(found, place, options), strict=True))
                for name in names:
                    value = options.get(name)
                    if isinstance(value, list | tuple):
                        options[name] = [known.get(id(each), each) for each in value]
                    elif value is not None:
                        options[name] = known.get(id(value), value)
                call: Callable[..., T] = verb
                return call(**options)

        return spmd(run)

    return decorated


def _is_given(model: Any) -> bool:
    """Return whether something that is to be a model is an object, not the name of one."""
    return not isinstance(model, str | os.PathLike | NamedDirectory)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _refuse_tokenizer(options: Mapping[str, Any]) -> None:
    if options.get("tokenizer") is not None:
        raise UserError(
            "tokenizer: expected none beside a directory, which holds its own, got one; save it there (tokenizer.save_pretrained)"
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """A temporary directory, and the models that were written to it."""

    path: Path
    written: list[NamedDirectory] = field(default_factory=list)


@contextmanager
def _place() -> Iterator[_Place]:
    """Return a context with a temporary directory, which rank 0 removes; errors call what lies in it by the names of the models."""
    place = _Place(on_main(lambda: Path(tempfile.mkdtemp(prefix="headfold-"))))
    try:
        yield place
    except UserError as error:
        said, _, _ = str(error).partition(f"{KEPT}{place.path}")  # nothing of it is kept
        for model in place.written:
            said = said.replace(str(model.path), model.name)
        raise type(error)(said.replace(f"{place.path}{os.sep}", "")) from error
    finally:
        if is_main():
            shutil.rmtree(place.path, ignore_errors=True)


def _written(models: Sequence[Any], place: _Place, options: dict[str, Any], copies: int = 1) -> list[NamedDirectory]:
    """Write models with what belongs to them, and let the verb run where the first lies; the disk must hold `copies` of each."""
    device = getattr(models[0], "device", None)
    if options.get("device") is None and device is not None and device.type != "meta":
        options["device"] = str(device)
    tokenizer = options.pop("tokenizer", None)
    for number, model in enumerate(models):
        directory = place.path / f"model-{number}"
        place.written.append(on_main(partial(_write, model, tokenizer, directory, copies)))
    return place.written


def _write(model: Any, tokenizer: Any, directory: Path, copies: int) -> NamedDirectory:
    """Write a model as transformers saves it, with the tokenizer or, without one, the files beside the model that it was opened from.

    Raises:
        UserError: it is no whole model of transformers, cannot be saved, or there is no room for it.
    """
    _check(model)
    name = _name(model)
    _require_room(model, directory, copies)
    before = {key: getattr(model.config, key, None) for key in _SAVED}
    with disk_errors(directory), library_errors(name, "transformers does not save this model"), quiet():
        directory.mkdir()
        if tokenizer is None and (beside := _opened_from(model)) is not None:
            copy_side_files(beside, directory)
            if (beside / CARD).is_file():  # its licence is that of the fold
                copy_file(beside / CARD, directory / CARD)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a part of the model may have to be read from disk
                model.save_pretrained(directory)
        finally:
            for key, value in before.items():
                setattr(model.config, key, value)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return NamedDirectory(directory, name)


def _check(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model: expected a checkpoint directory, a hub id or a PreTrainedModel of transformers, got {type(model).__name__}; pass the "
            "model inside it (model.module, model._orig_mod, or model.merge_and_unload() of an adapter)"
        )
    adapted = [name for name, _ in model.named_parameters() if ".base_layer." in name]
    if adapted or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{_name(model)}: expected a model without adapters, got one with some in it; merge them first (merge_and_unload of peft)"
        )


def _name(model: Any) -> str:
    """Return the name of a model: that of the directory or hub id that it was opened from, if there is one."""
    origin = _origin(model)
    return origin if model.config._name_or_path or not hasattr(model, "headfold") else f"fold-of-{Path(origin).name}"


def _origin(model: Any) -> str:
    """Return the directory or hub id that a model was opened from, or the original of a fold in memory; else the name of its class."""
    base = getattr(getattr(model, "headfold", None), "base_model", None)  # of a fold to fewer heads, or to MLA
    return model.config._name_or_path or base or type(model).__name__


def _opened_from(model: Any) -> Path | None:
    """Return the directory of the files beside the model that this one was opened from, if it is still here."""
    path = Path(_origin(model)).expanduser()
    if path.is_dir():
        return path if (path / CONFIG).is_file() else None
    return cached(_origin(model), getattr(model.config, "_commit_hash", None))


def _require_room(model: Any, directory: Path, copies: int) -> None:
    needed = copies * sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise UserError(
            f"{directory.parent.parent}: the disk is too full: expected room for {sizes(needed)}, got {sizes(free)} free; let TMPDIR name "
            "a place with more, or pass the directory of the model"
        )


def _device_map(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "hf_device_map", None) or {})


def _opened_like(model: Any, directory: Path, trusted: bool) -> "PreTrainedModel":
    """Open a fold in the dtype, on the devices and with the attention implementation of a model, by its code if that is trusted."""
    attention = getattr(model.config, "_attn_implementation", None)
    keywords: dict[str, Any] = {} if attention in _OWN_CHOICE else {"attn_implementation": attention}
    if trusted:
        keywords["trust_remote_code"] = True
    if devices := _device_map(model):
        keywords["device_map"] = devices
    folded: Any = load(directory, dtype=model.dtype, **keywords)
    with torch.no_grad():
        for parameter in folded.parameters():
            if (
                parameter.device.type == "cpu"
            ):  # a part of the file, which is removed and would take room as long as the model lives
                parameter.data = parameter.data.clone()
    # No name of another model, which tools such as peft would record as what their files belong to.
    folded.config._name_or_path = folded.name_or_path = ""
    return folded if devices or model.device.type == "meta" else folded.to(model.device)
