"""Make a plan: group the K/V heads of every site and predict the error of folding them. No model is run here."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from . import group as groupings
from .core import plugins
from .core.costs import Cost, summed
from .core.errors import UserError
from .core.groups import Groups, check_group_count
from .core.heads import Heads
from .core.methods import CostMethod, GroupingMethod
from .core.moments import Moments, site_moments
from .core.plan import Plan, SitePlan, head_dim_refusal
from .core.predict import grouped_error, site_energy
from .core.stats import SiteStats
from .families.layout import read_heads
from .families.spec import Site
from .group import costs
from .merge import parse_merge
from .threads import one_thread

Read = Callable[[str], Tensor]
_NUMBER = re.compile(r"[0-9]{1,15}(/[0-9]{1,15})?|[0-9]{0,15}\.[0-9]{1,15}")
LARGE = 2048
"""Hidden size above which Gram matrices are computed in float32: each has many terms, and only sums of errors are wanted."""
SMALL = 1024
"""Width of all query heads up to which a site is planned on one thread."""
PREDICTION_STATISTICS = frozenset({"second", "scatter"})
"""What the predicted errors in a plan are computed from."""


def parse_kv_heads(text: str | int, num_kv_heads: int, *, unequal: bool = False) -> int:
    """Return the count of K/V heads that `4`, or `1/2` or `50%` (of the source's `num_kv_heads`), means.

    Raises:
        UserError: not a number, or a count that does not divide the source's K/V heads where groups must be equal.
    """
    value = number_or_share("--kv-heads", str(text), "a count such as 4 or a share such as 1/2 or 50%")
    if set("/%") & set(str(text)) or value.denominator != 1:
        value *= num_kv_heads
    if value.denominator != 1 or value < 1:
        choices = ", ".join(map(str, divisors(num_kv_heads)))
        raise UserError(
            f"--kv-heads {text}: {float(value):g} of {num_kv_heads} K/V heads; choose {choices}, or any count with --group "
            "swap:unequal=true"
        )
    if not unequal or value > num_kv_heads:
        check_group_count(
            f"--kv-heads {text}", num_kv_heads, int(value), "; groups of different sizes: --group swap:unequal=true"
        )
    return int(value)


def number_or_share(option: str, text: str, expected: str) -> Fraction:
    """Return the value of `4`, `1/2`, `0.5` or `50%`.

    Raises:
        UserError: it is none of them.
    """
    digits, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        if not _NUMBER.fullmatch(digits):  # Fraction takes exponents too, and would write out their zeros
            raise ValueError("not a number")
        value = Fraction(digits)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{option} {text}: expected {expected}") from error
    return value / 100 if percent else value


def divisors(num_heads: int) -> list[int]:
    """Return the counts of K/V heads that equal groups allow."""
    return [n for n in range(1, num_heads + 1) if num_heads % n == 0]


@dataclass(frozen=True, slots=True)
class Grouping:
    """The value of `--group`: a solver, its cost (None where it uses none), and whether its groups may differ in size."""

    solver: plugins.Method[GroupingMethod]
    cost: plugins.Method[CostMethod] | None
    unequal: bool

    @property
    def statistics(self) -> frozenset[str]:
        """The statistics that the cost reads."""
        return frozenset() if self.cost is None else self.cost.record.statistics


def parse_group(text: str) -> Grouping:
    """Return the grouping that `SOLVER[:cost=COST,option=value]` names; without a cost, it has the solver's default one.

    Raises:
        UserError: unknown solver, cost or option.
    """
    name, _, tail = text.partition(":")
    items = [item for item in tail.split(",") if item]
    named = [item.removeprefix("cost=") for item in items if item.startswith("cost=")]
    rest = ",".join(item for item in items if not item.startswith("cost="))
    solver = plugins.parse(groupings, f"{name}:{rest}" if rest else name, GroupingMethod)
    unequal = solver.options.get("unequal", solver.record.unequal)
    if solver.record.default_cost is None:
        return Grouping(solver, None, unequal)
    cost = named[0] if named else solver.record.default_cost
    return Grouping(solver, plugins.parse(costs, cost, CostMethod), unequal)


def statistics_needed(group: str, merge: str) -> frozenset[str]:
    """Return the names of the statistics that a plan and a fold by these methods read (`SiteStats.tensors`); empty if none.

    Where there are any, those that predict the errors of the plan are among them.

    Raises:
        UserError: unknown method or option.
    """
    named = parse_group(group).statistics | parse_merge(merge).record.statistics
    return named | PREDICTION_STATISTICS if named else named


def counts_of(sites: Sequence[Site], kv_heads: str | int, grouping: Grouping) -> list[int]:
    """Return the count of K/V heads that `kv_heads` means (`parse_kv_heads`) for each site.

    Raises:
        UserError: a site cannot have that count.
    """
    return [
        parse_kv_heads(kv_heads, site.num_kv_heads, unequal=may_differ(site, unequal=grouping.unequal))
        for site in sites
    ]


def may_differ(site: Site, *, unequal: bool) -> bool:
    """Return whether a site's groups may differ in size: if the grouping allows it (`unequal`) and no order of heads is fixed (ALiBi)."""
    return unequal and site.query_order != "fixed"


@dataclass(frozen=True, slots=True)
class Choice:
    """Sites that must have the same groups (or one site), and the plan of each for every count of K/V heads."""

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
    """Group every site's K/V heads into `kv_heads` groups (`parse_kv_heads`) and predict the errors.

    The K/V cache is as large as with `kv_heads` heads of the source's head_dim: with a `head_dim_multiple` of 2 there are half as
    many heads, each with twice the head_dim.

    Sites that share one order of query heads (T5's stacks) get the same groups, chosen by the sum of their costs; where the order
    is fixed (ALiBi), neighbours are grouped. `read` returns a tensor by its name on disk. Without `stats`, costs are computed as if
    inputs were white noise, and no error is predicted.

    Raises:
        UserError: unknown method or option; a count that does not divide the heads.
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
    """Plan every site, or set of sites that must have the same groups, at each of its `counts` of K/V heads.

    Counts are of heads of the source's head_dim; with a `head_dim_multiple`, that many of them are replaced by one head of the same
    bytes. `workers` sites are planned at a time, each in its own thread.

    Raises:
        UserError: unknown method or option; a `head_dim_multiple` or a count that a site cannot have.
    """
    merging = str(parse_merge(merge))
    if head_dim_multiple > 1:
        check_head_dim_multiple(head_dim_multiple, sites, merge, grouping)

    def decide(together: list[Site]) -> Choice:
        progress(together[0].name)
        # Not in a pool: torch's number of threads belongs to the process, and threads would restore each other's.
        small = workers == 1 and together[0].num_heads * together[0].head_dim <= SMALL
        with one_thread() if small else nullcontext():
            return planned(together)

    def planned(together: list[Site]) -> Choice:
        analyses = [_SiteAnalysis.of(site, read, stats, head_dim_multiple) for site in together]
        plans = {}
        for count in counts(together[0]):
            if count % head_dim_multiple:
                raise UserError(
                    f"--kv-heads {count} --head-dim-multiple {head_dim_multiple}: expected a count that {head_dim_multiple} divides"
                )
            groups = _choose_groups(analyses, grouping, count // head_dim_multiple, seed)
            plans[count] = tuple(analysis.plan(groups, merging) for analysis in analyses)
        return Choice(tuple(together), plans)

    sets = _sites_grouped_together(sites)
    if workers == 1:
        return [decide(together) for together in sets]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(decide, sets))


def check_head_dim_multiple(head_dim_multiple: int, sites: Iterable[Site], merge: str, grouping: Grouping) -> None:
    """Refuse a multiple of the source's head_dim that the merge, the grouping or a site cannot have.

    Raises:
        UserError: names the method or the site.
    """
    option = f"--head-dim-multiple {head_dim_multiple}"
    merging = parse_merge(merge)
    if not merging.record.head_dim_multiples:
        raise UserError(f"{option}: --merge {merging.name} keeps the source's head_dim; choose --merge absorb")
    for site in sites:
        if reason := head_dim_refusal(site, head_dim_multiple):
            raise UserError(f"{option}: {site.name}: {reason}; choose another multiple, or leave the option out")
    if grouping.unequal:
        raise UserError(
            f"{option}: expected groups of equal size; leave unequal=true out, or choose another --group than kmeans"
        )


def assemble(
    sites: Sequence[Site],
    chosen: Iterable[tuple[Choice, int]],
    group: str,
    source: str,
    seed: int,
    calibration: Mapping[str, str] | None,
) -> Plan:
    """Return the plan with the given count of K/V heads for each choice."""
    found = {
        site.name: plan
        for choice, count in chosen
        for site, plan in zip(choice.sites, choice.plans[count], strict=True)
    }
    return Plan({site.name: found[site.name] for site in sites}, group, source, seed, calibration or {})


def _sites_grouped_together(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites in sets that must have the same groups: those of a stack with one order of query heads, every other one alone."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(f"stack {site.stack}" if site.query_order == "stack" else site.name, []).append(site)
    return list(stacks.values())


@dataclass(slots=True)
class _SiteAnalysis:
    """What is computed of one site, each part once and only if it is needed."""

    site: Site
    read: Read
    stats: SiteStats | None
    head_dim_multiple: int = 1
    _heads: Heads | None = None
    _moments: Moments | None = None
    _cost: Cost | None = None

    @classmethod
    def of(
        cls, site: Site, read: Read, stats: Mapping[str, SiteStats] | None, head_dim_multiple: int
    ) -> "_SiteAnalysis":
        return cls(site, read, None if stats is None else stats[site.name], head_dim_multiple)

    @property
    def heads(self) -> Heads:
        # A site of a 7B model is 134 MB: it is read only if something is computed from it.
        self._heads = read_heads(self.site, self.read) if self._heads is None else self._heads
        return self._heads

    @property
    def stats_or_isotropic(self) -> SiteStats:
        return self.stats or SiteStats.isotropic(self.heads.k.shape[2] - 1)

    @property
    def moments(self) -> Moments:
        if self._moments is None:
            products = torch.float32 if self.heads.k.shape[2] > LARGE else torch.float64
            self._moments = site_moments(self.heads, self.stats_or_isotropic, products=products)
        return self._moments

    def cost(self, method: plugins.Method[CostMethod]) -> Cost:
        """Return the cost of grouping heads of this site, made once: it remembers the sets that it computed for earlier counts."""
        if self._cost is None:
            self._cost = self._new_cost(method)
        return self._cost

    def _new_cost(self, method: plugins.Method[CostMethod]) -> Cost:
        record = method.record
        if record.cost_from_moments is None:
            return method(self.heads, self.stats_or_isotropic)
        multiple = {"head_dim_multiple": self.head_dim_multiple} if record.head_dim_multiples else {}
        return record.cost_from_moments(self.moments, **method.options, **multiple)

    def plan(self, groups: Groups, merge: str) -> SitePlan:
        dim = self.head_dim_multiple * self.site.head_dim
        if self.stats is None:
            return SitePlan(groups, merge, dim)
        error = grouped_error(self.moments, groups, self.head_dim_multiple)
        return SitePlan(groups, merge, dim, error, site_energy(self.moments))


def _choose_groups(analyses: Sequence[_SiteAnalysis], grouping: Grouping, num_kv_heads: int, seed: int) -> Groups:
    """Return one partition for all of the sites."""
    site = analyses[0].site
    num_heads = site.num_kv_heads
    if num_kv_heads in (1, num_heads) or site.query_order == "fixed":
        return Groups.contiguous(num_heads, num_kv_heads)
    if grouping.cost is None:
        return grouping.solver(None, num_heads, num_kv_heads, seed=seed)
    cost = summed([analysis.cost(grouping.cost) for analysis in analyses])
    return grouping.solver(cost, num_heads, num_kv_heads, seed=seed)
