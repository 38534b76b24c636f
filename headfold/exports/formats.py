"""The record that each engine format declares, and the discovery of formats: what `export` writes for engines that read files of their own.

A format is one file in `headfold/exports/engines` with one `FORMAT` record; the folder is the registry.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.reader import Checkpoint
from ..core import plugins
from ..core.errors import UserError
from ..core.progress import Progress
from . import engines
from .folded import Folded


@dataclass(frozen=True, slots=True)
class Written:
    """What a format wrote: the architecture as the engine calls it, and one line on it."""

    model_class: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFormat:
    """A form that one engine reads instead of a checkpoint directory, declared by one file in `headfold/exports/engines`.

    Attributes:
        name: the word for `--layout`.
        suffix: how the name of an output ends that is one file; empty where it is a directory.
        model_types: the `model_type`s that can be written.
        number_types: the words for `--quantise`; without it each tensor keeps its own numbers.
        why_not: returns the reason why one model of these types cannot be written, None where it can.
        write: writes the file, or into the directory, which is there; gets checkpoint, fold, path, number type or None, and a function
            that is told bytes done and in all.
        compare: runs in its engine what was written, and returns the largest difference from headfold's runtime, and the tolerance; None
            where headfold does not run the engine.
    """

    name: str
    suffix: str
    model_types: Sequence[str]
    number_types: Sequence[str]
    why_not: Callable[[Checkpoint, Folded], str | None]
    write: Callable[[Checkpoint, Folded, Path, str | None, Callable[[int, int], None]], Written]
    compare: Callable[[Checkpoint, Path, Progress], tuple[float, float]] | None = None


@functools.cache
def engine_formats() -> Mapping[str, EngineFormat]:
    """Return all formats by name."""
    return {page: plugins.load(engines, page, EngineFormat) for page in plugins.names(engines)}


def check_format(checkpoint: Checkpoint, source: Folded, name: str, out: Path, number_type: str | None) -> EngineFormat:
    """Return a format after checking that it holds the fold, before anything is written.

    Raises:
        UserError: it does not, the output has another suffix, or the number type is unknown.
    """
    found = check_output(name, out, number_type)
    if source.model_type not in found.model_types:
        listed = ", ".join(found.model_types)
        raise UserError(f"{checkpoint.path}: layout {name}: expected one of {listed}, got {source.model_type}")
    try:
        reason = found.why_not(checkpoint, source)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = f"expected a config that its class reads, got {type(error).__name__} {error}; fold again"
    if reason is not None:
        raise UserError(f"{checkpoint.path}: layout {name}: {reason}")
    return found


def check_output(name: str, out: Path, number_type: str | None) -> EngineFormat:
    """Return a format, checked to write such an output, whatever the model.

    Raises:
        UserError: the output has another suffix, or the number type is unknown.
    """
    found = engine_formats()[name]
    if found.suffix and out.suffix != found.suffix:
        raise UserError(f"{out}: layout {name}: expected a file name that ends in {found.suffix}; choose another")
    if number_type not in (None, *found.number_types):
        raise UserError(f"--quantise {number_type}: expected one of {', '.join(found.number_types)}")
    return found


def refuse_format(layout: str | None) -> None:
    """Refuse a format where a checkpoint is written.

    Raises:
        UserError: `layout` is one.
    """
    if layout is not None and layout in engine_formats():
        raise UserError(
            f"--layout {layout}: expected the layout of a checkpoint, got the format of an engine; leave it out, then run headfold export "
            f"FOLD OUT{engine_formats()[layout].suffix} --layout {layout}"
        )
