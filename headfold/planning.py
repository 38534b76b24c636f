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
    num_groups: int,
    *,
    source: str,
    group: str = "swap",
    merge: str = "absorb",
    stats: Mapping[str, SiteStats] | None = None,
    calibration: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Group every site's K/V heads into `num_groups` and predict the loss.

    `read` gives a tensor by its name on disk; without `stats`, costs are computed as if inputs were white, and nothing is predicted.

    Raises:
        UserError: unknown method or option; a count that does not split the heads.
    """
    chosen = plugins.parse(merges, merge, "merge")
    solver, cost_of = parse_group(group)
    planned = {}
    for site in sites:
        progress(site.name)
        check_group_count(site.name, site.num_groups, num_groups)
        planned[site.name] = _plan_site(
            site, read, solver, cost_of, chosen, num_groups, stats and stats[site.name], seed
        )
    return Plan(planned, group, source, seed, calibration or {})


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


def _plan_site(
    site: Site,
    read: Callable[[str], Tensor],
    solver: plugins.Method,
    cost_of: plugins.Method | None,
    merge: plugins.Method,
    num_groups: int,
    stats: SiteStats | None,
    seed: int,
) -> SitePlan:
    trivial = num_groups in (1, site.num_groups)
    asks = cost_of is not None and not trivial
    # A site of a 7B model is 134 MB: read only where something looks at it.
    heads = read_heads(site, read) if asks or stats is not None else None
    cost = cost_of(heads, stats or SiteStats.isotropic(heads.q.shape[2] - 1)) if asks else None
    groups = (
        Groups.contiguous(site.num_groups, num_groups)
        if trivial
        else solver(cost, site.num_groups, num_groups, seed=seed)
    )
    if stats is None:
        return SitePlan(groups, str(merge))
    moments = site_moments(heads, stats)
    return SitePlan(groups, str(merge), grouped_error(moments, groups), site_energy(moments))
