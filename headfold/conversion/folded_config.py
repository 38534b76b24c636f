"""The config.json of a folded checkpoint."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..core.errors import UserError
from ..core.groups import Groups
from ..core.plan import Plan, SitePlan
from ..families.folded import folded_config as config_of_counts
from ..families.spec import Site
from ..rotary_tables import table_of_multiple
from .source import Source


def folded_config(source: Source, plan: Plan) -> dict[str, Any]:
    """Return config.json as a fold has it; in headfold's own form where no stock class reads the result.

    Raises:
        UserError: the model's files have no place for these counts (`families.folded.folded_config`).
    """
    sites = {site.name: site for site in source.sites}
    config = source.checkpoint.config
    made = config_of_counts(
        source.family,
        config,
        sites.values(),
        _counts_to_write(sites, plan.num_kv_heads),
        _uneven_groups(sites, plan),
        plan.head_dim_multiples(sites.values()),
        partial(table_of_multiple, config, f"{source.name}/config.json"),
    )
    if source.code and "headfold" in made:
        raise UserError(
            f"{source.name}: expected equal groups, one count of K/V heads for all layers and the head_dim of the original, which is all "
            f"that {source.code[0]} reads from a config, got others; use --kv-heads and a --group with equal groups"
        )
    return made


def can_be_written(source: Source, plan: Plan) -> bool:
    """Return whether the model's files have a place for the plan's counts."""
    try:
        folded_config(source, plan)
    except UserError:
        return False
    return True


def refuse_counts_per_layer(source: Source) -> None:
    """Refuse a budget, before anything is measured, where the files have no place for counts that differ between layers.

    Raises:
        UserError: q, k and v are one tensor.
    """
    stock_gqa = [site.name for site in source.sites if site.stock_gqa]
    if len(stock_gqa) < 2:
        return
    counts = {site.name: site.num_kv_heads for site in source.sites} | {stock_gqa[0]: 1}
    sites = {
        s.name: SitePlan(Groups.contiguous(s.num_kv_heads, counts[s.name]), "mean", s.head_dim) for s in source.sites
    }
    if not can_be_written(source, Plan(sites, "contiguous", "", 0)):
        raise UserError(
            f"{source.name}: expected separate q, k and v for a budget, which gives layers different counts, but they are one tensor on "
            "disk with one count for all layers; use --kv-heads"
        )


def _counts_to_write(sites: Mapping[str, Site], counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts that the config must name; at a class without grouped heads not those it has, such as Falcon-7B's one."""
    fused = {name for name, site in sites.items() if "qkv" in site.weights and not site.splits(counts[name])}
    changed = {name for name, site in sites.items() if counts[name] < site.num_heads} - fused
    return {name: counts[name] for name, site in sites.items() if site.stock_gqa or name in changed}


def _uneven_groups(sites: Mapping[str, Site], plan: Plan) -> dict[str, Groups]:
    """Return the map query head → K/V head, in standard order, of the sites whose groups are not of equal size."""
    queries = {
        name: Groups.contiguous(site.num_heads, site.num_kv_heads).compose(plan.sites[name].groups)
        for name, site in sites.items()
    }
    return {name: Groups(tuple(sorted(q.group_of_head))) for name, q in queries.items() if not q.is_even}
