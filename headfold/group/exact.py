"""The partition of least cost, by dynamic programming over sets of heads.

Minimises Σ over groups of cost(group); each step fills the group of the lowest head that is still free. Equal groups need C(H,
size) costs. `unequal=true` allows groups of any sizes, and needs every subset's cost and 3^H steps, so at most 14 heads.
"""

import itertools
import math
from functools import cache

from ..core.costs import Cost, many
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.methods import GroupingMethod

MOST_SETS = 20_000
"""Most sets of heads that are tried for equal groups."""
MOST_UNEQUAL = 14
"""Most heads for groups of any sizes."""


def group(cost: Cost, num_heads: int, num_kv_heads: int, *, seed: int = 0, unequal: bool = False) -> Groups:
    """Return `num_kv_heads` groups of `num_heads` heads, equal unless `unequal`. `cost` takes the sorted heads of one group.

    Raises:
        UserError: there are too many sets to try.
    """
    if num_kv_heads in (1, num_heads):
        return Groups.contiguous(num_heads, num_kv_heads)
    size = num_heads // num_kv_heads
    num_sets = math.comb(num_heads, size)
    if (unequal and num_heads > MOST_UNEQUAL) or (not unequal and num_sets > MOST_SETS):
        limit = f"{MOST_UNEQUAL} heads" if unequal else f"{MOST_SETS} sets"
        tried = f"{num_heads} heads" if unequal else f"{num_sets} sets of {size} of {num_heads} heads"
        raise UserError(f"--group exact: expected at most {limit}, got {tried}; choose --group swap")
    return Groups.from_members((_unequal if unequal else _equal)(cost, num_heads, num_kv_heads))


def _equal(cost: Cost, num_heads: int, num_kv_heads: int) -> list[tuple[int, ...]]:
    size = num_heads // num_kv_heads
    sets = list(itertools.combinations(range(num_heads), size))
    cost_of = dict(zip(sets, many(cost, sets), strict=True))

    @cache
    def best(free: frozenset[int]) -> tuple[float, tuple[tuple[int, ...], ...]]:
        if not free:
            return 0.0, ()
        lowest, *others = sorted(free)
        options = []
        for rest in itertools.combinations(others, size - 1):
            heads = (lowest, *rest)
            tail, groups = best(free.difference(heads))
            options.append((cost_of[heads] + tail, (heads, *groups)))
        return min(options, key=lambda option: option[0])

    return list(best(frozenset(range(num_heads)))[1])


def _unequal(cost: Cost, num_heads: int, num_kv_heads: int) -> list[tuple[int, ...]]:
    """Return the cheapest groups of any sizes.

    Sets are bit masks; `best[mask]` is the least cost of splitting a mask into so many groups, and its last group.
    """
    members = [tuple(head for head in range(num_heads) if mask >> head & 1) for mask in range(1 << num_heads)]
    cost_of = [0.0, *many(cost, members[1:])]
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(num_kv_heads):
        found: dict[int, tuple[float, int]] = {}
        for done, (so_far, _) in best[-1].items():
            free = ~done & ((1 << num_heads) - 1)
            lowest = free & -free
            rest = free ^ lowest
            part = rest
            while lowest:  # all subsets of what is free that hold its lowest head
                mask = part | lowest
                total = so_far + cost_of[mask]
                if total < found.get(done | mask, (math.inf, 0))[0]:
                    found[done | mask] = total, mask
                if not part:
                    break
                part = (part - 1) & rest
        best.append(found)
    groups, done = [], (1 << num_heads) - 1
    for step in reversed(best[1:]):
        mask = step[done][1]
        groups.append(members[mask])
        done ^= mask
    return groups


GROUPING = GroupingMethod(group=group)
