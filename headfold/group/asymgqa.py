"""AsymGQA as published (2406.14963): swap heads between groups while that makes their activations more similar.

From neighbouring groups and `restarts` random ones, two heads of two groups are drawn and swapped if the mean similarity inside
groups increases, `tries` times; with `unequal=true` a head may also move, so groups of different sizes form. The similarity is
the mean of the cosines of keys and of values (`cost=cosine`, the default here). With `--merge mean` this is the whole method.
"""

import random

from ..core.costs import Cost, many
from ..core.groups import Groups
from ..core.methods import GroupingMethod


def group(
    cost: Cost,
    num_heads: int,
    num_kv_heads: int,
    *,
    seed: int = 0,
    unequal: bool = False,
    restarts: int = 4,
    tries: int = 1000,
) -> Groups:
    """Return `num_kv_heads` groups of `num_heads` heads, equal unless `unequal`. `cost` takes the sorted heads of one group."""
    if num_kv_heads in (1, num_heads):
        return Groups.contiguous(num_heads, num_kv_heads)
    draw = random.Random(seed)
    neighbours = list(Groups.contiguous(num_heads, num_kv_heads).members) if num_heads % num_kv_heads == 0 else None
    starts = [neighbours] if neighbours else []
    while len(starts) < restarts + 1:
        heads = draw.sample(range(num_heads), num_heads)
        cuts = [num_heads * at // num_kv_heads for at in range(num_kv_heads + 1)]
        starts.append([tuple(sorted(heads[a:b])) for a, b in zip(cuts, cuts[1:], strict=False)])
    ends = [_climb(cost, start, draw, tries, unequal=unequal) for start in starts]
    best = min(ends, key=lambda members: sum(many(cost, members)))
    return Groups.from_members(best)


def _climb(
    cost: Cost, members: list[tuple[int, ...]], draw: random.Random, tries: int, *, unequal: bool
) -> list[tuple[int, ...]]:
    """Swap (or move) heads drawn at random, `tries` times, keeping only changes that lower the cost."""
    for _ in range(tries):
        a, b = draw.sample(range(len(members)), 2)
        i, j = draw.choice(members[a]), draw.choice(members[b])
        if unequal and len(members[a]) > 1 and draw.random() < 0.5:
            made = tuple(h for h in members[a] if h != i), tuple(sorted((*members[b], i)))
        else:
            made = tuple(sorted({*members[a], j} - {i})), tuple(sorted({*members[b], i} - {j}))
        if sum(many(cost, list(made))) < sum(many(cost, [members[a], members[b]])):
            members[a], members[b] = made
    return members


GROUPING = GroupingMethod(group=group, default_cost="cosine")
