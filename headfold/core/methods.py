"""What a method page declares: one frozen record per merge, grouping solver, grouping cost and route.

A page is one file with one function and, at its end, one of these records. The drivers and the tests read the fields; nothing else
about a page is looked up.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .costs import Cost
from .groups import Groups
from .heads import Heads
from .routes import RouteState

Undoes = Literal["nothing", "copies", "rotations", "key_freedom"]
"""Which heads a merge makes one without loss: none; identical ones; also those that differ by rotations that attention does not see;
all that differ by transformations that `Heads.key_freedom` allows on K and by invertible matrices on V."""


class MethodRecord(ABC):
    """The record of one page."""

    @property
    @abstractmethod
    def function(self) -> Callable[..., Any]:
        """The page's function, whose keyword-only parameters are the options of the method."""


@dataclass(frozen=True, kw_only=True)
class MergeMethod(MethodRecord):
    """`merge(heads, groups, stats=None, *, seed=0, <options>) -> Heads`: makes one K/V head of the heads of each group."""

    merge: Callable[..., Heads]
    undoes: Undoes
    statistics: frozenset[str] = frozenset()
    """The statistics that the merge reads (`SiteStats.tensors`); without any of them it needs no calibration."""
    head_dim_multiples: bool = False
    """Whether it can make heads of several times the source's head_dim (`head_dim_multiple`)."""
    transforms_queries: bool = True
    """Whether it changes W_q and W_o; otherwise they are copied."""

    @property
    def function(self) -> Callable[..., Heads]:
        return self.merge

    @property
    def fits_distances(self) -> bool:
        """Whether the merge uses how far back attention looks (the statistic `attended`), or assumes it where it was not measured."""
        return "attended" in self.statistics


@dataclass(frozen=True, kw_only=True)
class GroupingMethod(MethodRecord):
    """`group(cost, num_heads, num_kv_heads, *, seed=0, <options>) -> Groups`: decides which heads share one K/V head."""

    group: Callable[..., Groups]
    default_cost: str | None = "absorb"
    """The page in `group/costs` to use where the user names none; None if the solver does not use a cost."""
    unequal: bool = False
    """Whether its groups always may differ in size; other solvers may offer that as an option `unequal`."""

    @property
    def function(self) -> Callable[..., Groups]:
        return self.group


@dataclass(frozen=True, kw_only=True)
class CostMethod(MethodRecord):
    """`cost(heads, stats, <options>) -> Cost`: says what it costs a set of heads to share one K/V head."""

    cost: Callable[..., Cost]
    undoes: Undoes
    """Heads that differ by that cost nothing to share."""
    cost_from_moments: Callable[..., Cost] | None = None
    """The same from the Gram matrices of the site (`Moments`), which the driver has computed already; it takes the same options."""
    statistics: frozenset[str] = frozenset({"second"})
    """The statistics that the cost reads; without any of them it needs no calibration."""
    head_dim_multiples: bool = False
    """Whether `cost_from_moments` takes a `head_dim_multiple`."""

    @property
    def function(self) -> Callable[..., Cost]:
        return self.cost


@dataclass(frozen=True, kw_only=True)
class RouteMethod(MethodRecord):
    """`route(state, norms, training, *, seed=0, <options>) -> RouteState`: chooses the K/V head of each query head at run time."""

    route: Callable[..., RouteState]
    settle: Callable[..., RouteState] | None = None
    """Fixes the groups by what has been measured so far; None where the route measures nothing."""
    perturb: Callable[..., Any] | None = None
    """Changes the output of the attention; None where the route leaves it alone."""
    published_depends_on_batch: bool = False
    """Whether with `published=true`, outside training, the output for an item depends on the rest of its batch or on earlier batches."""

    @property
    def function(self) -> Callable[..., RouteState]:
        return self.route
