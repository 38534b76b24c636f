"""Write a folded checkpoint: its weights, its config, the plan and everything that lies beside the source's weights."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import copy_side_files, write_json
from ..checkpoint.writer import output_bytes, rewrite
from ..core.errors import UserError
from ..core.fitted import FittedHeads
from ..core.json_input import read_object
from ..core.plan import Plan
from ..core.progress import Progress, counter
from ..core.stats import SiteStats
from ..exports.layout import choose_layout
from ..exports.pieces import Export
from ..exports.rounding import Unrounded
from ..families.layout import planned_shapes, renamed
from ..families.spec import Site
from ..runtime.remote import auto_map, remote_files
from ..surgery import kept_weights, query_order, read_without_kept, site_tensors
from .folded_config import folded_config
from .layouts import write_layout
from .source import Source


@dataclass(frozen=True, slots=True)
class Written:
    """A written fold; with an `export` also the directory of the grouped checkpoint that it was made from, `grouped`."""

    export: Export | None
    grouped: Path

    def unrounded(self, staging: Path, dtype: torch.dtype) -> Mapping[str, Tensor] | None:
        """Return the export's weights before they were rounded to the checkpoint's dtype, as verification compares them."""
        if self.export is None:
            return None
        return Unrounded(Checkpoint.open(self.grouped), self.export, staging, torch.promote_types(dtype, torch.float32))


def choose_fold_layout(source: Source, plan: Plan, requested: str | None) -> str | None:
    """Return the layout to write, None for headfold's own or the source's.

    Raises:
        UserError: the requested layout cannot hold the plan's counts.
    """
    return choose_layout(folded_config(source, plan), requested, f"{source.name}/config.json")


def write_fold(
    source: Source,
    plan: Plan,
    stats: Mapping[str, SiteStats] | None,
    refits: Mapping[str, FittedHeads] | None,
    staging: Path,
    work: Path,
    layout: str | None,
    progress: Progress,
) -> Written:
    """Write everything but the card into `staging`; `work` below it holds the grouped checkpoint that another layout is made from."""
    checkpoint, counts = source.checkpoint, plan.num_kv_heads
    sites = {site.name: site for site in source.sites}
    multiples = plan.head_dim_multiples(sites.values())
    planned = {
        name: planned_shapes(site, counts[name], lambda n: checkpoint.tensors[n].shape, multiples[name])
        for name, site in sites.items()
    }
    kept = {name: axis for site in sites.values() for name, axis in kept_weights(site, plan, refits).items()}
    shapes = {t: shape for of_site in planned.values() for t, shape in of_site.items() if t not in kept}
    instead = {old: new for name, site in sites.items() for old, new in renamed(site, counts[name]).items()}
    read = read_without_kept(kept, checkpoint.read, lambda n: checkpoint.tensors[n].shape)
    owner = {tensor: name for name, of_site in planned.items() for tensor in of_site}
    config, grouped = folded_config(source, plan), work / "grouped"
    target = grouped if layout else staging
    target.mkdir(exist_ok=True)
    rewrite(
        checkpoint,
        target,
        shapes,
        owner,
        lambda name: site_tensors(sites[name], plan, read, stats, refits),
        counter(progress, "write", output_bytes(checkpoint, shapes, instead)),
        instead,
    )
    copy_side_files(checkpoint.path, target)
    _renumber_alignment_heads(target, sites, plan)
    if "headfold" in config:  # after the side files: a source that is a fold itself brings such a file along
        config["auto_map"] = auto_map(config)
        for name, text in remote_files(config).items():
            (target / name).write_text(text)
    write_json(target / "config.json", config)
    write_json(staging / "plan.json", plan.to_json())
    export = write_layout(grouped, staging, layout, partial(progress, "export")) if layout else None
    return Written(export, grouped)


def _renumber_alignment_heads(target: Path, sites: Mapping[str, Site], plan: Plan) -> None:
    """Write the new places of the query heads by which a Whisper dates words: pairs of a decoder layer and a head of its cross-attention.

    What is said in another way is removed, because old places would date words wrongly and without an error.
    """
    file = target / "generation_config.json"
    try:
        generation = read_object(file)
        named = generation.pop("alignment_heads")
    except (OSError, UserError, KeyError):
        return
    if named is None:
        return
    with suppress(TypeError, ValueError, LookupError):
        places = [(sites[f"decoder.{layer}.cross"], layer, head) for layer, head in named]
        generation["alignment_heads"] = [[layer, query_order(site, plan).index(head)] for site, layer, head in places]
    write_json(file, generation)
