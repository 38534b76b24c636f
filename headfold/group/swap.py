"""Swap heads between equal groups while that lowers the summed cost, from several starts; exact up to 12 heads.

Minimises Σ over groups of cost(group) over balanced partitions. Up to `exact_up_to` heads the optimum is found by
dynamic programming over subsets (each step fills the group of the lowest free head); above, first-improvement local search from
the contiguous and from `restarts` − 1 random partitions. Local search by swaps is the scheme that 2406.14963 and
2412.20677 use on similarities; the objective here is whatever cost it is handed (`--group swap:cost=NAME`).
Cost: at most C(H−1, size−1) cost calls per level of the programme; per sweep of the search, every pair of heads in different groups once.
"""

import itertools
import random
from collections.abc import Callable
from functools import cache

from ..core.groups import Groups

Cost = Callable[[tuple[int, ...]], float]


def group(
    cost: Cost, num_heads: int, num_groups: int, *, seed: int = 0, restarts: int = 8, exact_up_to: int = 12
) -> Groups:
    """`num_groups` equal groups of `num_heads` heads. `cost` takes the sorted heads of one group."""
    size = num_heads // num_groups
    if size == 1 or num_groups == 1:
        return Groups.contiguous(num_heads, num_groups)
    cost = cache(cost)
    if num_heads <= exact_up_to:
        return Groups.from_members(_exact(cost, num_heads, size))
    draw = random.Random(seed)
    starts = [list(range(num_heads))] + [draw.sample(range(num_heads), num_heads) for _ in range(restarts - 1)]
    found = [_descend(cost, [sorted(start[at : at + size]) for at in range(0, num_heads, size)]) for start in starts]
    return Groups.from_members(min(found, key=lambda members: sum(cost(tuple(heads)) for heads in members)))


def _exact(cost: Cost, num_heads: int, size: int) -> list[tuple[int, ...]]:
    """The cheapest partition into groups of `size`, by dynamic programming over the set of heads still free."""

    @cache
    def best(free: frozenset[int]) -> tuple[float, tuple[tuple[int, ...], ...]]:
        if not free:
            return 0.0, ()
        lowest, *others = sorted(free)
        options = []
        for rest in itertools.combinations(others, size - 1):
            heads = (lowest, *rest)
            tail, groups = best(free.difference(heads))
            options.append((cost(heads) + tail, (heads, *groups)))
        return min(options, key=lambda option: option[0])

    return list(best(frozenset(range(num_heads)))[1])


def _descend(cost: Cost, members: list[list[int]]) -> list[list[int]]:
    """Swap until no single swap gains."""
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(members)), 2):
            for i, j in itertools.product(range(len(members[a])), range(len(members[b]))):
                left = sorted(members[a][:i] + members[a][i + 1 :] + [members[b][j]])
                right = sorted(members[b][:j] + members[b][j + 1 :] + [members[a][i]])
                now = cost(tuple(members[a])) + cost(tuple(members[b]))
                if cost(tuple(left)) + cost(tuple(right)) < now - 1e-12 * abs(now):
                    members[a], members[b], improved = left, right, True
    return members
