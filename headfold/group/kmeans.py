"""Groups of any sizes by k-means' rule: move single heads to the group where they add the least cost (Hartigan's method).

With the cost `wse` (the default here) this is k-means on the heads' weights, another way to solve QCQA's arbitrary cardinality;
any cost may be named. It starts from `starts` partitions, all but the first random, and returns the cheapest result.
"""

import random

from ..core.costs import Cost, many
from ..core.groups import Groups
from ..core.methods import GroupingMethod

GAIN = 1e-12
"""Relative gain below which a change is taken as rounding."""


def group(cost: Cost, num_heads: int, num_kv_heads: int, *, seed: int = 0, starts: int = 8) -> Groups:
    """Return `num_kv_heads` groups, none empty, of any sizes. `cost` takes the sorted heads of one group."""
    if num_kv_heads in (1, num_heads):
        return Groups.contiguous(num_heads, num_kv_heads)
    draw = random.Random(seed)
    ends = []
    for start in range(starts):
        labels = [head * num_kv_heads // num_heads for head in range(num_heads)]
        ends.append(_descend(cost, draw.sample(labels, num_heads) if start else labels, num_kv_heads))
    return min(ends, key=lambda groups: sum(many(cost, list(groups.members))))


def _descend(cost: Cost, labels: list[int], num_kv_heads: int) -> Groups:
    """Move heads in turn until a whole round moves none."""
    moved = True
    while moved:
        moved = False
        for head, own in enumerate(labels):
            others = [
                tuple(h for h, g in enumerate(labels) if g == group and h != head) for group in range(num_kv_heads)
            ]
            if not others[own]:
                continue  # its group would be left empty
            without = many(cost, others)
            added = many(cost, [tuple(sorted((*members, head))) for members in others])
            gains = [with_head - bare for with_head, bare in zip(added, without, strict=True)]
            best = min(range(num_kv_heads), key=gains.__getitem__)
            if gains[best] < gains[own] - GAIN * abs(gains[own]):
                labels[head], moved = best, True
    return Groups.of(labels)


GROUPING = GroupingMethod(group=group, default_cost="wse", unequal=True)
