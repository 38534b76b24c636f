"""Pure surgery: apply a plan to a checkpoint's tensors. No model is run here."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from . import merge as merges
from .core import plugins
from .core.errors import UserError
from .core.groups import Groups
from .core.heads import Heads
from .core.plan import Plan, SitePlan
from .core.stats import SiteStats
from .families.layout import read_heads, write_heads
from .families.spec import Site

Refits = Mapping[str, Mapping[str, Tensor]]
"""By site, fields of its merged heads (in standard order) and what replaces them."""


def merged_heads(heads: Heads, plan: SitePlan, stats: SiteStats | None, seed: int) -> Heads:
    """The site folded, query heads in standard order; dtype is the merge's own (float64 for those that align)."""
    method = plugins.parse(merges, plan.merge, "merge")
    head_dim_multiple = plan.head_dim // heads.head_dim
    if head_dim_multiple > 1 and not getattr(plugins.load(merges, method.name), "HEAD_DIM_MULTIPLE", False):
        raise UserError(
            f"plan: {method.name} knows heads of the source's width alone; make the plan with --merge absorb"
        )
    wide = {"head_dim_multiple": head_dim_multiple} if head_dim_multiple > 1 else {}
    return method(heads, plan.groups, stats, seed=seed, **wide).standard()


def kept_weights(site: Site, plan: Plan, refits: Refits | None = None) -> dict[str, int]:
    """Weights of the site that the plan leaves as they are, so that nobody need read or write them, each with its model axis.

    Q and O move only where the merge turns them, or where the groups ask for another order of the query heads.
    """
    planned = plan.sites[site.name]
    method = plugins.load(merges, planned.merge.partition(":")[0])
    in_source_form = not (site.transposed or site.splits(planned.groups.num_kv_heads))
    if getattr(method, "TRANSFORMS_QUERIES", True) or not (planned.groups.is_contiguous and in_source_form):
        return {}
    moved = (refits or {}).get(site.name, {})
    roles = {role: axis for role, axis in (("q", 1), ("o", 0)) if role in site.weights and role not in moved}
    return {f"{site.weights[role]}.weight": axis for role, axis in roles.items()}


def read_without_kept(
    kept: Mapping[str, int], read: Callable[[str], Tensor], shape_of: Callable[[str], tuple[int, ...]]
) -> Callable[[str], Tensor]:
    """`read`, except that kept weights come without their model axis: as many heads as on disk, and no numbers."""

    def read_rest(name: str) -> Tensor:
        if name not in kept:
            return read(name)
        shape = list(shape_of(name))
        shape[kept[name]] = 0
        return torch.empty(shape)

    return read_rest


def site_heads(
    site: Site,
    plan: Plan,
    read: Callable[[str], Tensor],
    stats: Mapping[str, SiteStats] | None = None,
    refits: Refits | None = None,
) -> Heads:
    """The site's heads as the plan has them: grouped, in standard order, in the source's dtype.

    Queries of wide heads are scaled up where their class divides logits by the root of the width.
    """
    heads = read_heads(site, read)
    planned, fields = plan.sites[site.name], dict((refits or {}).get(site.name, {}))
    if fields.keys() >= {"q", "k", "v", "o"}:  # merged before: what is left to take over is the order
        merged = replace(heads, groups=heads.groups.compose(planned.groups)).standard()
    else:
        merged = merged_heads(heads, planned, stats and stats[site.name], plan.seed)
        if planned.head_dim > site.head_dim and site.any_head_dim and site.scale_from_head_dim:
            merged = replace(merged, q=merged.q * (planned.head_dim / site.head_dim) ** 0.5)
    return replace(merged, **fields).to(heads.k.dtype)


def query_order(site: Site, plan: Plan) -> tuple[int, ...]:
    """The order of a folded site's query heads: new position → head of the source."""
    return Groups.contiguous(site.num_heads, site.num_kv_heads).compose(plan.sites[site.name].groups).standard_order()


def site_tensors(
    site: Site,
    plan: Plan,
    read: Callable[[str], Tensor],
    stats: Mapping[str, SiteStats] | None = None,
    refits: Refits | None = None,
    *,
    num_kv_heads: int | None = None,
) -> dict[str, Tensor]:
    """The site's new tensors by their names on disk, in the source's dtype.

    `num_kv_heads` asks for the head-repeated twin with that many K/V heads: the same function in the source's shapes, or slot by slot
    where heads are wide.

    Raises:
        UserError: NaN or infinite weights in the source, or a merge that overflows the checkpoint's dtype.
    """
    heads = site_heads(site, plan, read, stats, refits)
    twin = num_kv_heads is not None
    tensors = write_heads(site, heads.expand(num_kv_heads) if twin else heads, in_slots=twin)
    bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise UserError(f"{site.name}: {bad[0]} is not finite after folding; the source has NaN or overflows its dtype")
    return tensors
