"""Which layouts a folded checkpoint can take, and which one is chosen where nobody says."""

from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from . import decilm, padding, per_layer, transplant
from .folded import Folded, folded
from .pieces import Export

LAYOUTS = ("native", "padded", "per-layer", "decilm")
MODEL_TYPES = frozenset((*transplant.DONORS, *padding.MODEL_TYPES, *per_layer.MODEL_TYPES, *decilm.MODEL_TYPES))
"""All that have any layout."""
_LEAVE_OUT = "leave out --layout, headfold's runtime runs it"
OWN = "headfold"
"""The form in which headfold's own runtime reads a fold: as it was written."""


def choose_layout(config: Mapping[str, Any], asked: str | None = None, where: str = "config.json") -> str | None:
    """The layout to write a fold in, whose config headfold's runtime would read; None where it stays as it is.

    Unless one is `asked` for, that is the one that stock transformers loads, if there is one and the fold is not in it yet.

    Raises:
        UserError: the layout asked for is unknown, or none of this model's.
    """
    if asked == OWN or (asked is None and "headfold" not in config):
        return None
    if any("slots" in site for site in config.get("headfold", {}).get("sites", [])):
        if asked is None:
            return None
        raise UserError(
            f"{where}: layout {asked}: heads wider than the source's have no layout but headfold's; {_LEAVE_OUT}, or make them "
            "of the source's width"
        )
    if config["model_type"] not in MODEL_TYPES:
        if asked is None:
            return None
        raise UserError(f"{where}: layout {asked}: {config['model_type']} has no class for it; {_LEAVE_OUT}")
    source = folded(config, where)
    if asked is not None:
        _refuse(source, asked)
        return asked
    best = "per-layer" if not source.is_uniform else "native" if source.is_even else "padded"
    return None if why_not(source, best) else best


def query_heads(config: Mapping[str, Any], layout: str | None) -> tuple[int, ...]:
    """Query heads of every layer as `layout` writes them, zero heads included. Empty where no layout is written."""
    if layout is None:
        return ()
    source = folded(config)
    widest = max(entry.width for entry in source.entries)
    within = layout == "per-layer"  # each layer is filled up to its own largest group, else all to the largest of all
    return tuple(entry.groups.num_kv_heads * (entry.width if within else widest) for entry in source.entries)


def make_export(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """What `layout` makes of a checkpoint; nothing is read yet.

    Raises:
        UserError: the layout is none of this model's.
    """
    _refuse(source, layout)
    return _MAKERS[layout](checkpoint, source, layout)


def _refuse(source: Folded, layout: str) -> None:
    reason = why_not(source, layout)
    if reason:
        raise UserError(f"{source.where}: {reason}")


def why_not(source: Folded, layout: str) -> str | None:
    """Why a model has not this layout, and what to do instead; None where it has."""
    if layout not in LAYOUTS:
        return f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}"
    if not source.entries:
        return f"layout {layout}: {source.model_type} has no class for it; {_LEAVE_OUT}"
    return _REFUSALS[layout](source)


def _uniform(source: Folded, layout: str) -> str | None:
    if source.is_uniform:
        return None
    counts = ", ".join(map(str, source.counts))
    return f"layout {layout}: expected equally many K/V heads in every layer, got {counts}; use --layout per-layer"


def _no_native(source: Folded) -> str | None:
    if not source.is_even:
        return "layout native: expected equal groups, got groups of different sizes; use --layout padded"
    return _uniform(source, "native") or _no_class(source, "native", None)


def _no_padded(source: Folded) -> str | None:
    if source.is_even and source.is_uniform:
        return "layout padded: expected groups of different sizes, got equal ones, which need none; use --layout native"
    return _uniform(source, "padded") or _no_class(source, "padded", padding.why_not(source))


def _no_class(source: Folded, layout: str, of_padding: str | None) -> str | None:
    """Llama's relatives keep their class, or get one that pads; others need a transplant."""
    relative = source.model_type in padding.MODEL_TYPES
    reason = of_padding if relative else transplant.why_not(source)
    return reason and f"layout {layout}: {reason}; {_LEAVE_OUT}"


def _no_per_layer(source: Folded) -> str | None:
    reason = per_layer.why_not(source)
    return reason and f"layout per-layer: {reason}"


def _no_decilm(source: Folded) -> str | None:
    reason = decilm.why_not(source)
    return reason and f"layout decilm: {reason}; {_LEAVE_OUT}"


def _native(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    make = padding.standard_order if source.model_type in padding.MODEL_TYPES else transplant.transplant
    return make(checkpoint, source, layout)


def _padded(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    make = padding.pad if source.model_type in padding.MODEL_TYPES else transplant.transplant
    return make(checkpoint, source, layout)


_REFUSALS: Mapping[str, Callable[[Folded], str | None]] = {
    "native": _no_native, "padded": _no_padded, "per-layer": _no_per_layer, "decilm": _no_decilm,
}  # fmt: skip
_MAKERS: Mapping[str, Callable[[Checkpoint, Folded, str], Export]] = {
    "native": _native, "padded": _padded, "per-layer": per_layer.per_layer, "decilm": decilm.decilm,
}  # fmt: skip
