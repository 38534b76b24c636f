"""The record that each export layout declares, the discovery of layouts, and the choice among them.

A layout is one file in `headfold/exports/layouts` with one `LAYOUT` record; the folder is the registry.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..checkpoint.reader import Checkpoint
from ..core import plugins
from ..core.errors import UserError
from . import layouts
from .folded import Folded, folded
from .formats import refuse_format
from .pieces import Export

OWN = "headfold"
"""Name of the form that `fold` writes for headfold's own runtime; it needs no export."""
_LEAVE_OUT = "leave out --layout, headfold's runtime runs it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLayout:
    """A form of checkpoint that a stock class or an engine reads, declared by one file in `headfold/exports/layouts`.

    Attributes:
        name: the word for `--layout`.
        model_types: the `model_type`s that can be written in it.
        why_not: returns the reason why one model of these types cannot be written in it, None where it can. It is asked only after
            the two needs below are met.
        export: returns the layout's config and the tensors to write; reads no tensor itself.
        needs_one_count: whether all layers need the same number of K/V heads.
        needs_equal_groups: whether all groups of one layer need the same size.
        pads_groups_to: the size that smaller groups are filled up to with zero query heads: the largest group of the same layer, or of
            the whole model.
        priority: the place among the layouts that `fold` tries by itself, lowest first; None for one that must be asked for.
    """

    name: str
    model_types: Sequence[str]
    why_not: Callable[[Folded], str | None]
    export: Callable[[Checkpoint, Folded], Export]
    needs_one_count: bool
    needs_equal_groups: bool
    pads_groups_to: Literal["layer", "model"]
    priority: int | None


@functools.cache
def export_layouts() -> Mapping[str, ExportLayout]:
    """Return all layouts by name, those that `fold` tries by itself first."""
    found = [plugins.load(layouts, page, ExportLayout) for page in plugins.names(layouts)]
    found.sort(key=lambda layout: (layout.priority is None, layout.priority, layout.name))
    return {layout.name: layout for layout in found}


def choose_layout(config: Mapping[str, Any], requested: str | None = None, where: str = "config.json") -> str | None:
    """Return the name of the layout to write a fold in, None to leave the fold as headfold's runtime reads it.

    Without `requested`, this is the first layout by priority that can hold the model, provided that the fold needs headfold's runtime now.

    Raises:
        UserError: the requested layout is unknown, or cannot hold this model.
    """
    refuse_format(requested)
    if requested == OWN or (requested is None and "headfold" not in config):
        return None
    if any("slots" in site for site in config.get("headfold", {}).get("sites", [])):
        if requested is None:
            return None
        raise UserError(
            f"{where}: layout {requested}: heads with a larger head_dim than the source's can be written for headfold's runtime only; "
            f"{_LEAVE_OUT}, or fold with --head-dim-multiple 1"
        )
    known = {model_type for layout in export_layouts().values() for model_type in layout.model_types}
    if config["model_type"] not in known:
        if requested is None:
            return None
        raise UserError(f"{where}: layout {requested}: {config['model_type']} has no class for it; {_LEAVE_OUT}")
    source = folded(config, where)
    if requested is not None:
        _refuse(source, requested)
        return requested
    return _first_possible(source)


def query_heads(config: Mapping[str, Any], layout: str | None) -> tuple[int, ...]:
    """Return the number of query heads of each layer as `layout` writes them, zero heads included; empty where no layout is written."""
    if layout is None:
        return ()
    source = folded(config)
    per_layer = export_layouts()[layout].pads_groups_to == "layer"
    return tuple(
        entry.groups.num_kv_heads * (entry.group_size if per_layer else source.group_size) for entry in source.entries
    )


def make_export(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """Return what `layout` makes of a checkpoint, without reading any tensor.

    Raises:
        UserError: the layout is unknown, or cannot hold this model.
    """
    _refuse(source, layout)
    return export_layouts()[layout].export(checkpoint, source)


def why_not(source: Folded, name: str) -> str | None:
    """Return why a model cannot be written in a layout, None where it can."""
    layout = export_layouts().get(name)
    if layout is None:
        return f"layout is {name!r}, expected one of {', '.join(export_layouts())}"
    if not source.entries or source.is_fused or source.model_type not in layout.model_types:
        return (
            f"layout {name}: {source.model_type} has no class for it, expected one of {', '.join(layout.model_types)}"
        )
    if layout.needs_one_count and not source.is_uniform:
        found = ", ".join(map(str, source.counts))
        return f"layout {name}: expected equally many K/V heads in every layer, got {found}"
    if layout.needs_equal_groups and not source.is_even:
        return f"layout {name}: expected equal groups, got groups of different sizes"
    reason = layout.why_not(source)
    return reason and f"layout {name}: {reason}"


def _first_possible(source: Folded) -> str | None:
    """Return the first layout by priority that can hold the model."""
    chosen = [layout for layout in export_layouts().values() if layout.priority is not None]
    return next((layout.name for layout in chosen if why_not(source, layout.name) is None), None)


def _refuse(source: Folded, name: str) -> None:
    reason = why_not(source, name)
    if reason is None:
        return
    if name in export_layouts():
        other = _first_possible(source)
        reason += f"; use --layout {other}" if other else f"; {_LEAVE_OUT}"
    raise UserError(f"{source.where}: {reason}")
