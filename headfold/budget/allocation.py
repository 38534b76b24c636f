"""Allocate K/V heads to layers: the counts that lose least within a budget, or need the smallest cache for a loss, found exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..group.evolve import require_pymoo


@dataclass(frozen=True, slots=True)
class CountOption:
    """One count of K/V heads for sites that are decided together: its cache and its loss increase."""

    num_kv_heads: int
    kv_bytes: int
    """K/V bytes per token."""
    loss_increase: float


Options = Mapping[str, Sequence[CountOption]]
"""The possible counts of sites that are decided together, by the name of the site, or of the first site of a stack."""
Allocation = dict[str, int]
"""The chosen counts, by the same names."""
POINTS = 33
"""Number of budgets that `pareto_front` tries."""


def allocate(options: Options, *, max_bytes: float | None = None, max_loss: float | None = None) -> Allocation:
    """Return the counts of least loss within `max_bytes` per token or, with `max_loss`, of fewest bytes within that loss.

    Both are read off the exact Pareto front: among equal losses the one with fewer bytes, among equal bytes the one that loses less.

    Raises:
        UserError: even the smallest counts take more bytes, or even the largest lose more.
    """
    assert (max_bytes is None) != (max_loss is None)
    _check(options, max_bytes, max_loss)
    num_bytes, loss, stages = _front(options)
    if max_bytes is not None:
        place = int(np.searchsorted(num_bytes, max_bytes, side="right")) - 1
    else:  # losses fall along the front; the last is _check's least but for rounding of sums
        place = min(int(np.count_nonzero(loss > max_loss)), len(loss) - 1)
    return _chosen(options, stages, place)


def _front(options: Options) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return bytes and losses of every allocation that no other beats, ascending in bytes, and how each was reached.

    A dynamic programme: names are added one at a time, and for every sum of bytes only the least loss is kept; there are no more sums
    than heads. Stage i holds, for each point of the front of the first i names, the point it extends and the option taken.
    """
    num_bytes, loss, stages = np.zeros(1, np.int64), np.zeros(1), []
    for listed in options.values():
        sums = (num_bytes[:, None] + np.array([option.kv_bytes for option in listed], np.int64)).ravel()
        losses = (loss[:, None] + np.array([option.loss_increase for option in listed], float)).ravel()
        order = np.lexsort((losses, sums))
        least = np.minimum.accumulate(losses[order])
        better = np.append(True, losses[order][1:] < least[:-1])
        kept = order[better]
        num_bytes, loss = sums[kept], losses[kept]
        stages.append(np.stack([kept // len(listed), kept % len(listed)], 1))
    return num_bytes, loss, stages


def _chosen(options: Options, stages: list[np.ndarray], place: int) -> Allocation:
    """Return the allocation at a point of the front."""
    found = {}
    for name, stage in zip(reversed(list(options)), reversed(stages), strict=True):
        place, taken = stage[place]
        found[name] = options[name][taken].num_kv_heads
    return {name: found[name] for name in options}


def check_bytes(least: float, limit: float | None) -> None:
    """Refuse a limit, in bytes per token, below the least that can be reached.

    Raises:
        UserError: names both.
    """
    if limit is not None and least > limit:
        raise UserError(
            f"K/V budget: expected at least {least:.0f} bytes per token, which the fewest allowed K/V heads take, got {limit:.0f}; "
            "allow fewer heads or raise the budget"
        )


def _check(options: Options, max_bytes: float | None, max_loss: float | None) -> None:
    least_bytes = sum(min(option.kv_bytes for option in listed) for listed in options.values())
    least_loss = sum(min(option.loss_increase for option in listed) for listed in options.values())
    check_bytes(least_bytes, max_bytes)
    if max_loss is not None and least_loss > max_loss:
        raise UserError(
            f"--max-loss-increase {max_loss:g}: expected at least {least_loss:.3g}, the predicted loss increase of the most allowed K/V "
            "heads; allow more heads"
        )


def pareto_front(options: Options) -> list[Allocation]:
    """Return the best allocations of `POINTS` evenly spaced budgets, from fewest to most bytes, each losing less than all before it."""
    num_bytes, _, stages = _front(options)
    budgets = np.linspace(num_bytes[0], num_bytes[-1], POINTS)
    places = np.unique(np.searchsorted(num_bytes, budgets.round(), side="right") - 1)
    return [_chosen(options, stages, int(place)) for place in places]


def total(options: Options, allocation: Mapping[str, int]) -> CountOption:
    """Return the heads, bytes and loss increase of an allocation, summed."""
    taken = [
        next(option for option in options[name] if option.num_kv_heads == count) for name, count in allocation.items()
    ]
    return CountOption(
        sum(option.num_kv_heads for option in taken),
        sum(option.kv_bytes for option in taken),
        sum(option.loss_increase for option in taken),
    )


def require_qcqa() -> None:
    """Refuse QCQA's allocation where pymoo is not installed.

    Raises:
        UserError: names the package.
    """
    require_pymoo("--allocation qcqa needs", "leave it out")


def allocate_qcqa(
    options: Options, max_bytes: float, *, seed: int = 1234, population: int = 100, generations: int = 100
) -> Allocation:
    """Run QCQA's second stage (2406.10247): NSGA-II chooses the layers that are grouped; the others keep their heads.

    A grouped name takes its option with fewest heads. Loss and bytes are minimised together; the result is the least loss within the
    budget among all allocations tried. For comparison: `allocate` is exact, and chooses the count as well.

    Raises:
        UserError: pymoo is not installed, or no choice of layers is within the budget.
    """
    require_qcqa()
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.pntx import TwoPointCrossover
    from pymoo.operators.mutation.bitflip import BitflipMutation
    from pymoo.optimize import minimize

    _check(options, max_bytes, None)
    ends = [(min(o, key=lambda x: x.num_kv_heads), max(o, key=lambda x: x.num_kv_heads)) for o in options.values()]
    bytes_of, loss_of = (
        np.array([[getattr(end, name) for end in pair] for pair in ends]) for name in ("kv_bytes", "loss_increase")
    )
    best: tuple[float, np.ndarray | None] = (np.inf, None)

    class Layers(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: object, **__: object) -> None:
            nonlocal best
            kept = np.where(x, 0, 1)
            layer = np.arange(len(ends))
            num_bytes, loss = bytes_of[layer, kept].sum(1), loss_of[layer, kept].sum(1)
            for row, paid, lost in zip(x, num_bytes, loss, strict=True):
                if paid <= max_bytes and lost < best[0]:
                    best = float(lost), row.copy()
            out["F"] = np.stack([num_bytes, loss], 1)

    # All grouped is tried first: it is within every budget that _check lets pass.
    first = np.random.default_rng(seed).random((population, len(ends))) < 0.5
    first[0] = True
    algorithm = NSGA2(
        pop_size=population, sampling=first, crossover=TwoPointCrossover(prob=0.9),
        mutation=BitflipMutation(), eliminate_duplicates=True,
    )  # fmt: skip
    minimize(Layers(n_var=len(ends), n_obj=2, xl=0, xu=1, vtype=bool), algorithm, ("n_gen", generations), seed=seed)
    assert best[1] is not None
    return {
        name: pair[0 if grouped else 1].num_kv_heads
        for name, pair, grouped in zip(options, ends, best[1], strict=True)
    }  # fmt: skip
