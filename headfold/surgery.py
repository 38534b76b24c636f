"""Pure surgery: apply a plan to a checkpoint's tensors. No model is run here."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import merge as merges
from .core import plugins
from .core.errors import UserError
from .core.heads import Heads
from .core.plan import Plan, SitePlan
from .core.stats import SiteStats
from .families.layout import read_heads, write_heads
from .families.spec import Site


def merged_heads(heads: Heads, plan: SitePlan, stats: SiteStats | None, seed: int) -> Heads:
    """The site folded, query heads in standard order; dtype is the merge's own (float64 for those that align)."""
    method = plugins.parse(merges, plan.merge, "merge")
    return method(heads, plan.groups, stats, seed=seed).standard()


def site_tensors(
    site: Site,
    plan: Plan,
    read: Callable[[str], Tensor],
    stats: Mapping[str, SiteStats] | None = None,
    refits: Mapping[str, Tensor] | None = None,
    *,
    num_groups: int | None = None,
) -> dict[str, Tensor]:
    """The site's new tensors by their names on disk, in the source's dtype.

    `refits` maps names of output projections to tensors that replace the merged ones. `num_groups` asks for the
    head-repeated twin with that many K/V heads (the same function in the source's shapes).

    Raises:
        UserError: NaN or infinite weights in the source, or a merge that overflows the checkpoint's dtype.
    """
    heads = read_heads(site, read)
    merged = merged_heads(heads, plan.sites[site.name], stats and stats[site.name], plan.seed).to(heads.k.dtype)
    tensors = write_heads(site, merged if num_groups is None else merged.expand(num_groups))
    for name in tensors.keys() & (refits or {}).keys():
        tensors[name] = refits[name].to(tensors[name].dtype)
    bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise UserError(f"{site.name}: {bad[0]} is not finite after folding; the source has NaN or overflows its dtype")
    return tensors
