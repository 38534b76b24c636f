"""Make a plan: group the K/V heads of every site and predict what that loses. No model is run here."""

import inspect
from collections.abc import Callable, Mapping
from fractions import Fraction

from torch import Tensor

from . import group as solvers
from . import merge as merges
from .core import plugins
from .core.errors import UserError
from .core.groups import Groups, check_group_count
from .core.moments import site_moments
from .core.plan import Plan, SitePlan
from .core.predict import grouped_error, site_energy
from .core.stats import SiteStats
from .families.layout import read_heads
from .families.spec import Site
from .group import costs


def parse_kv_heads(text: str | int, num_groups: int) -> int:
    """`4` or `1/2` (of the source's K/V heads) → a count.

    Raises:
        UserError: not a number, or one that does not split the source's K/V heads equally.
    """
    try:
        value = Fraction(str(text))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--kv-heads {text}: expected a count such as 4 or a fraction such as 1/2") from error
    if "/" in str(text) or value.denominator != 1:
        value *= num_groups
    if value.denominator != 1 or value < 1:
        choices = ", ".join(str(n) for n in range(1, num_groups + 1) if num_groups % n == 0)
        raise UserError(f"--kv-heads {text}: {float(value):g} of {num_groups} K/V heads; choose {choices}")
    check_group_count(f"--kv-heads {text}", num_groups, int(value))
    return int(value)


def make_plan(
    sites: list[Site],
    read: Callable[[str], Tensor],
    kv_heads: str | int,
    *,
    source: str,
    group: str = "swap",
    merge: str = "absorb",
    stats: Mapping[str, SiteStats] | None = None,
    calibration: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Group every site's K/V heads into `kv_heads` (`parse_kv_heads`) and predict the loss.

    Sites that share one order of query heads (T5's stacks) are grouped alike, by the sum of their costs; where the order is
    fixed (ALiBi) neighbours share. `read` gives a tensor by its name on disk; without `stats`, costs are computed as if inputs
    were white, and nothing is predicted.

    Raises:
        UserError: unknown method or option; a count that does not split the heads.
    """
    chosen = plugins.parse(merges, merge, "merge")
    solver, cost_of = parse_group(group)
    planned: dict[str, SitePlan] = {}
    for together in _decided_together(sites):
        progress(together[0].name)
        num_groups = parse_kv_heads(kv_heads, together[0].num_groups)
        groups = _grouped(together, read, solver, cost_of, num_groups, stats, seed)
        for site in together:
            planned[site.name] = _plan_site(site, read, groups, chosen, stats and stats[site.name])
    return Plan({site.name: planned[site.name] for site in sites}, group, source, seed, calibration or {})


def _decided_together(sites: list[Site]) -> list[list[Site]]:
    """Each site alone, but the sites of a stack with one order of query heads at once."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(f"stack {site.stack}" if site.query_order == "stack" else site.name, []).append(site)
    return list(stacks.values())


def parse_group(text: str) -> tuple[plugins.Method, plugins.Method | None]:
    """`SOLVER[:cost=COST,option=value]` → the solver and the cost it asks, absorb's where none is named."""
    name, _, tail = text.partition(":")
    items = [item for item in tail.split(",") if item]
    named = [item.removeprefix("cost=") for item in items if item.startswith("cost=")]
    rest = ",".join(item for item in items if not item.startswith("cost="))
    solver = plugins.parse(solvers, f"{name}:{rest}" if rest else name, "group")
    if not getattr(inspect.getmodule(solver.function), "ASKS_COST", True):
        return solver, None
    return solver, plugins.parse(costs, named[0] if named else "absorb", "cost")


def _grouped(
    sites: list[Site],
    read: Callable[[str], Tensor],
    solver: plugins.Method,
    cost_of: plugins.Method | None,
    num_groups: int,
    stats: Mapping[str, SiteStats] | None,
    seed: int,
) -> Groups:
    """One partition for all of `sites`."""
    num_heads = sites[0].num_groups
    if num_groups in (1, num_heads) or sites[0].query_order == "fixed":
        return Groups.contiguous(num_heads, num_groups)
    if cost_of is None:
        return solver(None, num_heads, num_groups, seed=seed)
    costs = []
    for site in sites:
        heads = read_heads(site, read)
        costs.append(
            cost_of(heads, stats[site.name] if stats is not None else SiteStats.isotropic(heads.k.shape[2] - 1))
        )
    return solver(lambda members: sum(cost(members) for cost in costs), num_heads, num_groups, seed=seed)


def _plan_site(
    site: Site, read: Callable[[str], Tensor], groups: Groups, merge: plugins.Method, stats: SiteStats | None
) -> SitePlan:
    # A site of a 7B model is 134 MB: read only where there is something to predict from.
    if stats is None:
        return SitePlan(groups, str(merge), site.head_dim)
    moments = site_moments(read_heads(site, read), stats)
    return SitePlan(groups, str(merge), site.head_dim, grouped_error(moments, groups), site_energy(moments))
