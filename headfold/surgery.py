"""Apply a plan to the tensors of a checkpoint. No model is run here."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .core.errors import UserError
from .core.fitted import FittedHeads
from .core.groups import Groups
from .core.heads import Heads
from .core.plan import Plan, SitePlan
from .core.quantised_cache import rotated_for_cache
from .core.stats import SiteStats
from .families.layout import read_heads, write_heads
from .families.spec import Site
from .merge import parse_merge


def merged_heads(heads: Heads, plan: SitePlan, stats: SiteStats | None, seed: int) -> Heads:
    """Return the site's heads merged as the plan says, query heads in standard order, in the merge's own dtype.

    Raises:
        UserError: the merge needs statistics, or cannot make heads of the plan's head_dim.
    """
    method = parse_merge(plan.merge)
    multiple = plan.head_dim // heads.head_dim
    if multiple > 1 and not method.record.head_dim_multiples:
        raise UserError(
            f"plan.json: {method.name} cannot make heads of {multiple} times the source's head_dim; "
            "make the plan with --merge absorb"
        )
    options = {"head_dim_multiple": multiple} if multiple > 1 else {}
    return method(heads, plan.groups, stats, seed=seed, **options).standard()


def kept_weights(site: Site, plan: Plan, refits: Mapping[str, FittedHeads] | None = None) -> dict[str, int]:
    """Return the weights of the site that the plan does not change, each with the number of its model axis.

    They need not be read or written. Q and O change only if the merge transforms them, if fitted weights replace them, if K and V are
    rotated for a quantised cache, or if the groups put the query heads in another order.
    """
    if plan.quantised_cache:
        return {}
    planned = plan.sites[site.name]
    in_source_form = not (site.transposed or site.splits(planned.groups.num_kv_heads))
    if parse_merge(planned.merge).record.transforms_queries or not (planned.groups.is_contiguous and in_source_form):
        return {}
    fitted = (refits or {}).get(site.name)
    kept = {"q": 1} if fitted is None or not fitted.is_complete else {}
    kept |= {"o": 0} if fitted is None else {}
    return {f"{site.weights[role]}.weight": axis for role, axis in kept.items() if role in site.weights}


def read_without_kept(
    kept: Mapping[str, int], read: Callable[[str], Tensor], shape_of: Callable[[str], tuple[int, ...]]
) -> Callable[[str], Tensor]:
    """Return `read`, except that kept weights come without their model axis: with the heads on disk, but no numbers."""

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
    refits: Mapping[str, FittedHeads] | None = None,
) -> Heads:
    """Return the folded heads of a site: grouped, in standard order, in the source's dtype.

    `refits` gives fitted weights by site, which replace the merge's. Where heads have a multiple of the source's head_dim and their
    class divides logits by the root of it, queries are scaled up. They are those that a refit starts from: not yet rotated for a
    quantised cache.
    """
    heads = read_heads(site, read)
    return _folded(heads, site, plan, stats, refits).to(heads.k.dtype)


def _folded(
    heads: Heads,
    site: Site,
    plan: Plan,
    stats: Mapping[str, SiteStats] | None,
    refits: Mapping[str, FittedHeads] | None,
) -> Heads:
    """Return the folded heads in the dtype of the merge or the fit."""
    planned, fitted = plan.sites[site.name], (refits or {}).get(site.name)
    if fitted is not None and fitted.is_complete:
        # Only the order of the query heads is still the source's.
        folded = replace(heads, groups=heads.groups.compose(planned.groups)).standard()
    else:
        folded = merged_heads(heads, planned, None if stats is None else stats[site.name], plan.seed)
        if planned.head_dim > site.head_dim and site.any_head_dim and site.scale_from_head_dim:
            folded = replace(folded, q=folded.q * (planned.head_dim / site.head_dim) ** 0.5)
    return folded if fitted is None else fitted.onto(folded)


def query_order(site: Site, plan: Plan) -> tuple[int, ...]:
    """Return the order of a folded site's query heads: new position → head of the source."""
    return Groups.contiguous(site.num_heads, site.num_kv_heads).compose(plan.sites[site.name].groups).standard_order()


def site_tensors(
    site: Site,
    plan: Plan,
    read: Callable[[str], Tensor],
    stats: Mapping[str, SiteStats] | None = None,
    refits: Mapping[str, FittedHeads] | None = None,
    *,
    num_kv_heads: int | None = None,
) -> dict[str, Tensor]:
    """Return the site's new tensors by their names on disk, in the source's dtype.

    With `num_kv_heads` these are the tensors of the head-repeated twin with that many K/V heads: the same function in the source's
    shapes or, where heads have a multiple of the source's head_dim, slot by slot. Where the plan says so, K and V are rotated for a
    quantised cache, after all that was merged and fitted.

    Raises:
        UserError: NaN or infinite weights in the source, a merge that overflows the checkpoint's dtype, or no statistics for the rotation.
    """
    source = read_heads(site, read)
    heads = _folded(source, site, plan, stats, refits)
    if plan.quantised_cache:
        if stats is None:
            raise UserError(
                "plan.json: quantised_cache needs calibration statistics: run headfold calibrate and pass --stats, or leave it out"
            )
        heads = rotated_for_cache(heads, stats[site.name].mean_input(), site.head_dim, plan.seed)
    heads = heads.to(source.k.dtype)
    twin = num_kv_heads is not None
    tensors = write_heads(site, heads if num_kv_heads is None else heads.expand(num_kv_heads), in_slots=twin)
    for role in ("q_norm", "k_norm"):
        if role in site.weights:
            tensors[site.tensor(role)] = tensors[site.tensor(role)].to(read(site.tensor(role)).dtype)
    bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise UserError(
            f"{site.name}: {bad[0]} is not finite after folding; check the source for NaN weights, or store it in a wider dtype"
        )
    return tensors
