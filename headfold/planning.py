"""Make a plan: group the K/V heads of every site and predict what that loses. No model is run here."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from . import group as solvers
from . import merge as merges
from .core import plugins
from .core.costs import Cost, summed
from .core.errors import UserError
from .core.groups import Groups, check_group_count
from .core.heads import Heads
from .core.moments import Moments, site_moments
from .core.plan import Plan, SitePlan, not_wide
from .core.predict import grouped_error, site_energy
from .core.stats import SiteStats
from .families.layout import read_heads
from .families.spec import Site
from .group import costs

Read = Callable[[str], Tensor]
LARGE = 2048
"""Inputs of a site above which Gram matrices are multiplied out in float32: their terms are many, and only sums of errors are wanted."""


def parse_kv_heads(text: str | int, num_kv_heads: int, *, unequal: bool = False) -> int:
    """`4` or `1/2` (of the source's K/V heads) → a count.

    Raises:
        UserError: not a number, or one that does not split the source's K/V heads equally where groups have to be equal.
    """
    try:
        value = Fraction(str(text))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--kv-heads {text}: expected a count such as 4 or a fraction such as 1/2") from error
    if "/" in str(text) or value.denominator != 1:
        value *= num_kv_heads
    if value.denominator != 1 or value < 1:
        choices = ", ".join(map(str, divisors(num_kv_heads)))
        raise UserError(f"--kv-heads {text}: {float(value):g} of {num_kv_heads} K/V heads; choose {choices}")
    if not unequal or value > num_kv_heads:
        check_group_count(f"--kv-heads {text}", num_kv_heads, int(value))
    return int(value)


def divisors(num_heads: int) -> list[int]:
    """Counts of K/V heads that equal groups allow."""
    return [n for n in range(1, num_heads + 1) if num_heads % n == 0]


@dataclass(frozen=True, slots=True)
class Grouping:
    """`--group`: a solver, the cost it asks, and whether its groups may differ in size."""

    solver: plugins.Method
    cost: plugins.Method | None
    unequal: bool

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that it cannot do without; a cost that says nothing needs some."""
        return () if self.cost is None else getattr(inspect.getmodule(self.cost.function), "NEEDS", ("second",))


def parse_group(text: str) -> Grouping:
    """`SOLVER[:cost=COST,option=value]`; where no cost is named, the solver's own or absorb's."""
    name, _, tail = text.partition(":")
    items = [item for item in tail.split(",") if item]
    named = [item.removeprefix("cost=") for item in items if item.startswith("cost=")]
    rest = ",".join(item for item in items if not item.startswith("cost="))
    solver = plugins.parse(solvers, f"{name}:{rest}" if rest else name, "group")
    page = inspect.getmodule(solver.function)
    unequal = solver.options.get("unequal", getattr(page, "UNEQUAL", False))
    if not getattr(page, "ASKS_COST", True):
        return Grouping(solver, None, unequal)
    return Grouping(
        solver, plugins.parse(costs, named[0] if named else getattr(page, "COST", "absorb"), "cost"), unequal
    )


def counts_of(sites: Sequence[Site], kv_heads: str | int, grouping: Grouping) -> list[int]:
    """Of every site the count that `kv_heads` means (`parse_kv_heads`).

    Raises:
        UserError: a site cannot have it.
    """
    return [
        parse_kv_heads(kv_heads, site.num_kv_heads, unequal=may_differ(site, unequal=grouping.unequal))
        for site in sites
    ]


def may_differ(site: Site, *, unequal: bool) -> bool:
    """Whether a site's groups may differ in size, where the grouping's may: those of neighbours in a fixed order (ALiBi) may not."""
    return unequal and site.query_order != "fixed"


@dataclass(frozen=True, slots=True)
class Choice:
    """Sites that are decided together, and what becomes of each of them by the count of K/V heads."""

    sites: tuple[Site, ...]
    plans: Mapping[int, tuple[SitePlan, ...]]


def make_plan(
    sites: list[Site],
    read: Read,
    kv_heads: str | int,
    *,
    source: str,
    group: str = "swap",
    merge: str = "absorb",
    stats: Mapping[str, SiteStats] | None = None,
    calibration: Mapping[str, str] | None = None,
    seed: int = 0,
    head_dim_multiple: int = 1,
    workers: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Group every site's K/V heads into `kv_heads` (`parse_kv_heads`) and predict the loss.

    The cache is that of `kv_heads` heads of the source's width: with a `head_dim_multiple` of 2 there are half as many, twice as wide.

    Sites that share one order of query heads (T5's stacks) are grouped alike, by the sum of their costs; where the order is
    fixed (ALiBi) neighbours share. `read` gives a tensor by its name on disk; without `stats`, costs are computed as if inputs
    were white, and nothing is predicted.

    Raises:
        UserError: unknown method or option; a count that does not split the heads.
    """
    grouping = parse_group(group)
    made = choices(
        sites, read, lambda site: counts_of([site], kv_heads, grouping), grouping=grouping, merge=merge, stats=stats, seed=seed,
        head_dim_multiple=head_dim_multiple, workers=workers, progress=progress,
    )  # fmt: skip
    return assemble(sites, [(choice, next(iter(choice.plans))) for choice in made], group, source, seed, calibration)


def choices(
    sites: Sequence[Site],
    read: Read,
    counts: Callable[[Site], Sequence[int]],
    *,
    grouping: Grouping,
    merge: str,
    stats: Mapping[str, SiteStats] | None,
    seed: int = 0,
    head_dim_multiple: int = 1,
    workers: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Choice]:
    """For every site, or sites that have to be grouped alike, the groups at each of `counts` and what they are predicted to lose.

    Counts are of heads of the source's width, whose cache `head_dim_multiple` times fewer, wider ones share.
    `workers` sites are looked at side by side, each in a thread of its own.
    """
    merging = str(plugins.parse(merges, merge, "merge"))
    if head_dim_multiple > 1:
        check_head_dim_multiple(head_dim_multiple, sites, merge, grouping)

    def decide(together: list[Site]) -> Choice:
        progress(together[0].name)
        views = [_View.of(site, read, stats, head_dim_multiple) for site in together]
        planned = {}
        for count in counts(together[0]):
            if count % head_dim_multiple:
                raise UserError(
                    f"--kv-heads {count} --head-dim-multiple {head_dim_multiple}: expected a count that the width divides"
                )
            groups = _grouped(views, grouping, count // head_dim_multiple, seed)
            planned[count] = tuple(view.plan(groups, merging) for view in views)
        return Choice(tuple(together), planned)

    difference_and_tolerance = _decided_together(sites)
    if workers == 1:
        return [decide(together) for together in difference_and_tolerance]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(decide, difference_and_tolerance))


def check_head_dim_multiple(head_dim_multiple: int, sites: Iterable[Site], merge: str, grouping: Grouping) -> None:
    """Refuse heads wider than the source's where a method or a site cannot have them.

    Raises:
        UserError: says which.
    """
    asked = f"--head-dim-multiple {head_dim_multiple}"
    name = merge.partition(":")[0]
    if not getattr(plugins.load(merges, name), "HEAD_DIM_MULTIPLE", False):
        raise UserError(f"{asked}: --merge {name} knows heads of the source's width alone; use --merge absorb")
    for site in sites:
        if reason := not_wide(site, head_dim_multiple):
            raise UserError(f"{asked}: {site.name}: {reason}; choose another, or leave it out")
    if grouping.unequal:
        raise UserError(
            f"{asked}: expected equal groups; leave out unequal=true, or choose another --group than kmeans"
        )


def assemble(
    sites: Sequence[Site],
    chosen: Iterable[tuple[Choice, int]],
    group: str,
    source: str,
    seed: int,
    calibration: Mapping[str, str] | None,
) -> Plan:
    """The plan that takes of each choice the count beside it."""
    found = {
        site.name: plan
        for choice, count in chosen
        for site, plan in zip(choice.sites, choice.plans[count], strict=True)
    }
    return Plan({site.name: found[site.name] for site in sites}, group, source, seed, calibration or {})


def _decided_together(sites: Sequence[Site]) -> list[list[Site]]:
    """Each site alone, but the sites of a stack with one order of query heads at once."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(f"stack {site.stack}" if site.query_order == "stack" else site.name, []).append(site)
    return list(stacks.values())


@dataclass(slots=True)
class _View:
    """A site with what was computed of it, each thing once and only if asked for."""

    site: Site
    read: Read
    stats: SiteStats | None
    head_dim_multiple: int = 1
    _heads: Heads | None = None
    _moments: Moments | None = None
    _cost: Cost | None = None

    @classmethod
    def of(cls, site: Site, read: Read, stats: Mapping[str, SiteStats] | None, head_dim_multiple: int) -> "_View":
        return cls(site, read, None if stats is None else stats[site.name], head_dim_multiple)

    @property
    def heads(self) -> Heads:
        # A site of a 7B model is 134 MB: read only where there is something to compute from.
        self._heads = read_heads(self.site, self.read) if self._heads is None else self._heads
        return self._heads

    @property
    def moments(self) -> Moments:
        if self._moments is None:
            given = self.stats or SiteStats.isotropic(self.heads.k.shape[2] - 1)
            large = self.heads.k.shape[2] > LARGE
            self._moments = site_moments(self.heads, given, products=torch.float32 if large else torch.float64)
        return self._moments

    def cost(self, method: plugins.Method) -> Cost:
        """Of the one method that a run groups by; it remembers sets, so all counts share what they ask."""
        page = inspect.getmodule(method.function)
        if self._cost is None and hasattr(page, "cost_of"):
            width = {"head_dim_multiple": self.head_dim_multiple} if getattr(page, "HEAD_DIM_MULTIPLE", False) else {}
            self._cost = page.cost_of(self.moments, **method.options, **width)
        elif self._cost is None:
            self._cost = method(self.heads, self.stats or SiteStats.isotropic(self.heads.k.shape[2] - 1))
        return self._cost

    def plan(self, groups: Groups, merge: str) -> SitePlan:
        dim = self.head_dim_multiple * self.site.head_dim
        if self.stats is None:
            return SitePlan(groups, merge, dim)
        error = grouped_error(self.moments, groups, self.head_dim_multiple)
        return SitePlan(groups, merge, dim, error, site_energy(self.moments))


def _grouped(views: Sequence[_View], grouping: Grouping, num_kv_heads: int, seed: int) -> Groups:
    """One partition for all of the sites."""
    site = views[0].site
    num_heads = site.num_kv_heads
    if num_kv_heads in (1, num_heads) or site.query_order == "fixed":
        return Groups.contiguous(num_heads, num_kv_heads)
    if grouping.cost is None:
        return grouping.solver(None, num_heads, num_kv_heads, seed=seed)
    cost = summed([view.cost(grouping.cost) for view in views])
    return grouping.solver(cost, num_heads, num_kv_heads, seed=seed)
