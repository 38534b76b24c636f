"""The config of what a plan makes of a checkpoint."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..core.errors import UserError
from ..core.groups import Groups
from ..core.plan import Plan, SitePlan
from ..families.folded import folded_config
from ..families.spec import Site
from ..runtime.rotary import wide_table
from .source import Source


def config_of(source: Source, plan: Plan) -> dict[str, Any]:
    """As config.json will have it, in headfold's own form where no stock class reads it.

    Raises:
        UserError: the model's files have no place for these counts (`families.folded.folded_config`).
    """
    sites = {site.name: site for site in source.sites}
    counts, uneven = _changed(sites, plan.num_kv_heads), _uneven(sites, plan)
    config = source.checkpoint.config
    return folded_config(
        source.family,
        config,
        sites.values(),
        counts,
        uneven,
        plan.head_dim_multiples(sites.values()),
        partial(wide_table, config),
    )


def refuse_mixed(source: Source) -> None:
    """Refuse a budget, before anything is measured, where the files have no place for counts that differ between layers.

    Raises:
        UserError: says so.
    """
    native = [site.name for site in source.sites if site.stock_gqa]
    if len(native) < 2:
        return
    counts = {site.name: site.num_kv_heads for site in source.sites} | {native[0]: 1}
    sites = {
        s.name: SitePlan(Groups.contiguous(s.num_kv_heads, counts[s.name]), "mean", s.head_dim) for s in source.sites
    }
    try:
        config_of(source, Plan(sites, "contiguous", "", 0))
    except UserError as error:
        raise UserError(
            f"{source.name}: a budget gives layers counts of their own, but here q, k and v are one tensor on disk, split by one count "
            "for all; use --kv-heads"
        ) from error


def _changed(sites: Mapping[str, Site], counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of the sites that a config must speak of: those of a class without K/V heads only where these are fewer."""
    return {name: counts[name] for name, site in sites.items() if site.stock_gqa or counts[name] < site.num_heads}


def _uneven(sites: Mapping[str, Site], plan: Plan) -> dict[str, Groups]:
    """Query head → K/V head in standard order, of the sites whose groups are not equal."""
    queries = {
        name: Groups.contiguous(site.num_heads, site.num_kv_heads).compose(plan.sites[name].groups)
        for name, site in sites.items()
    }
    return {name: Groups(tuple(sorted(q.group_of_head))) for name, q in queries.items() if not q.is_even}
