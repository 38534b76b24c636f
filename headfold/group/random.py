"""A random partition into equal groups: the baseline for every search."""

import random
from collections.abc import Callable

from ..core.groups import Groups
from ..core.methods import GroupingMethod


def group(
    cost: Callable[[tuple[int, ...]], float] | None, num_heads: int, num_kv_heads: int, *, seed: int = 0
) -> Groups:
    """Return `num_kv_heads` equal groups of `num_heads` heads, drawn by `seed`; the cost is not used."""
    heads = list(range(num_heads))
    random.Random(seed).shuffle(heads)
    size = num_heads // num_kv_heads
    return Groups.from_members([heads[start : start + size] for start in range(0, num_heads, size)])


GROUPING = GroupingMethod(group=group, default_cost=None)
