"""Evolutionary search by NSGA-II, through pymoo (`pip install headfold[evolve]`): the solver of QCQA (2406.10247) for any cost.

Equal groups: a genome is an order of the heads, cut into blocks, and the cost is minimised. `unequal=true`: a genome is a label
per head, and both the number of groups and the cost are minimised; the cheapest partition tried with the requested number of
groups is returned. For comparison only: exact finds partitions at least as cheap, and swap finds ones within a thousandth or
cheaper, in a fraction of the time.
"""

from typing import Any

import numpy as np

from ..core.costs import Cost, many
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.methods import GroupingMethod


def group(
    cost: Cost,
    num_heads: int,
    num_kv_heads: int,
    *,
    seed: int = 0,
    unequal: bool = False,
    population: int = 100,
    generations: int = 100,
) -> Groups:
    """Return `num_kv_heads` groups of `num_heads` heads, equal unless `unequal`. `cost` takes the sorted heads of one group.

    Raises:
        UserError: pymoo is not installed.
    """
    if num_kv_heads in (1, num_heads):
        return Groups.contiguous(num_heads, num_kv_heads)
    search = _unequal if unequal else _equal
    return search(cost, num_heads, num_kv_heads, seed=seed, population=population, generations=generations)


def require_pymoo(needed_by: str = "--group evolve and qcqa need", instead: str = "choose swap") -> None:
    """Check that pymoo is installed; `needed_by` and `instead` are for the message.

    Raises:
        UserError: it is not.
    """
    try:
        import pymoo  # noqa: F401
    except ImportError as error:
        raise UserError(f"{needed_by} pymoo: pip install 'headfold[evolve]', or {instead}") from error


def _minimise(problem: Any, algorithm: Any, generations: int, seed: int) -> None:
    from pymoo.optimize import minimize

    minimize(problem, algorithm, ("n_gen", generations), seed=seed, verbose=False)


def _equal(cost: Cost, num_heads: int, num_kv_heads: int, *, seed: int, population: int, generations: int) -> Groups:
    require_pymoo()
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ox import OrderCrossover
    from pymoo.operators.mutation.inversion import InversionMutation
    from pymoo.operators.sampling.rnd import PermutationRandomSampling

    size, best = num_heads // num_kv_heads, _Best()

    class Blocks(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            made = [[tuple(sorted(map(int, block))) for block in row.reshape(num_kv_heads, size)] for row in x]
            out["F"] = best.evaluate(cost, made)[:, None]

    algorithm = NSGA2(
        pop_size=population, sampling=PermutationRandomSampling(), crossover=OrderCrossover(),
        mutation=InversionMutation(), eliminate_duplicates=True,
    )  # fmt: skip
    _minimise(Blocks(n_var=num_heads, n_obj=1, xl=0, xu=num_heads - 1, vtype=int), algorithm, generations, seed)
    return Groups.from_members(best.members)


def _unequal(cost: Cost, num_heads: int, num_kv_heads: int, *, seed: int, population: int, generations: int) -> Groups:
    require_pymoo()
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling

    best = _Best(num_kv_heads)

    class Labels(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            made = [list(Groups.of(row.tolist()).members) for row in x.astype(int)]
            counts = np.array([len(members) for members in made], dtype=float)
            out["F"] = np.stack([counts / num_heads, best.evaluate(cost, made)], 1)

    algorithm = NSGA2(
        pop_size=population, sampling=IntegerRandomSampling(),
        crossover=SBX(prob=0.9, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=1 / num_heads, vtype=float, repair=RoundingRepair()), eliminate_duplicates=True,
    )  # fmt: skip
    _minimise(Labels(n_var=num_heads, n_obj=2, xl=0, xu=num_kv_heads - 1, vtype=int), algorithm, generations, seed)
    return Groups.from_members(_split(cost, best.members or [tuple(range(num_heads))], num_kv_heads))


class _Best:
    """The cheapest partition evaluated so far; with `num_kv_heads`, among those with so many groups."""

    def __init__(self, num_kv_heads: int | None = None) -> None:
        self.members: list[tuple[int, ...]] = []
        self._least, self._num_kv_heads = np.inf, num_kv_heads

    def evaluate(self, cost: Cost, made: list[list[tuple[int, ...]]]) -> np.ndarray:
        """Return the cost of each partition, and remember the cheapest."""
        flat = iter(many(cost, [members for groups in made for members in groups]))
        totals = np.array([sum(next(flat) for _ in groups) for groups in made])
        for groups, total in zip(made, totals, strict=True):
            if total < self._least and self._num_kv_heads in (None, len(groups)):
                self.members, self._least = groups, total
        return totals


def _split(cost: Cost, members: list[tuple[int, ...]], num_kv_heads: int) -> list[tuple[int, ...]]:
    """Split the costliest groups, one head at a time, until there are `num_kv_heads` of them."""
    while len(members) < num_kv_heads:
        found = [each if len(one) > 1 else -np.inf for one, each in zip(members, many(cost, members), strict=True)]
        worst = int(np.argmax(found))
        members = [*members[:worst], members[worst][:-1], members[worst][-1:], *members[worst + 1 :]]
    return members


GROUPING = GroupingMethod(group=group)
