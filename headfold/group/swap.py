"""Swap heads between groups while that lowers the summed cost, from several starts; exact up to 12 heads.

Minimises Σ over groups of cost(group) over partitions into equal groups; with `unequal=true` heads may also move to other groups.
Up to `exact_up_to` heads the optimum is found (`--group exact`). Above, the best single swap or move is made until none improves,
on the sum of the costs of all pairs of heads in a group: exact for cosine, procrustes and wse with equal groups, an approximation
for others, since the true cost of absorb is an eigenproblem per set. The results of all `restarts` (contiguous, random) are then
ranked by the true cost and, if that is cheap or there are at most `descend_up_to` heads, the best few are improved on it.
2406.14963 and 2412.20677 use local search by swaps on similarities; here it minimises any cost (`--group swap:cost=NAME`).
"""

import itertools
import random

import torch
from torch import Tensor

from ..core.costs import Cost, SetCost, many, pair_matrix
from ..core.groups import Groups
from ..core.methods import GroupingMethod
from . import exact

GAIN = 1e-12
"""Relative gain below which a change is taken as rounding."""
FURTHER = 8
"""Number of results that are improved on the true cost."""
Partition = list[tuple[int, ...]]
Pair = tuple[tuple[int, ...], tuple[int, ...]]


def group(
    cost: Cost,
    num_heads: int,
    num_kv_heads: int,
    *,
    seed: int = 0,
    unequal: bool = False,
    restarts: int = 32,
    exact_up_to: int = 12,
    descend_up_to: int = 16,
) -> Groups:
    """Return `num_kv_heads` groups of `num_heads` heads, equal unless `unequal`. `cost` takes the sorted heads of one group."""
    if num_kv_heads in (1, num_heads):
        return Groups.contiguous(num_heads, num_kv_heads)
    if num_heads <= exact_up_to:
        return exact.group(cost, num_heads, num_kv_heads, unequal=unequal)
    draw = random.Random(seed)
    size = num_heads / num_kv_heads
    labels = [int(head / size) for head in range(num_heads)]
    drawn = [labels, *(draw.sample(labels, num_heads) for _ in range(restarts - 1))]
    pairs = pair_matrix(cost, num_heads)
    ends = list(dict.fromkeys(_descend_on_pairs(pairs, start, num_kv_heads, unequal=unequal) for start in drawn))
    ends.sort(key=lambda groups: _total(cost, list(groups.members)))
    cheap = isinstance(cost, SetCost) and cost.cheap
    if num_heads > descend_up_to and not cheap:
        return ends[0]
    further = [descend(cost, list(end.members), unequal=unequal) for end in ends[:FURTHER]]
    best = min(further, key=lambda members: _total(cost, members))
    return Groups.from_members(best)


def _total(cost: Cost, members: Partition) -> float:
    return sum(many(cost, members))


def _descend_on_pairs(pairs: Tensor, labels: list[int], num_kv_heads: int, *, unequal: bool) -> Groups:
    """Make the best swap or move until none improves, where costs are sums over pairs."""
    group = torch.tensor(labels)
    inside = torch.nn.functional.one_hot(group, num_kv_heads).to(pairs.dtype)
    scale = GAIN * pairs.abs().sum().item()
    while True:
        to = pairs @ inside  # (head, group): what a head costs with the heads of a group
        here = to.gather(1, group[:, None])
        moved = to - here
        swapped = moved[:, group] + moved[:, group].T - 2 * pairs
        swapped[group[:, None] == group] = 0
        swap = int(swapped.argmin())
        gain = float(swapped.flatten()[swap])
        change: tuple[int, int | None] = (swap // len(group), swap % len(group))
        if unequal:
            moved[inside.sum(0)[group] == 1] = 0  # a group of one would be left empty
            move = int(moved.argmin())
            if float(moved.flatten()[move]) < gain:
                gain, change = float(moved.flatten()[move]), (move // num_kv_heads, None)
        if gain >= -scale:
            return Groups.of(group.tolist())
        i, j = change
        group[i], other = (group[j] if j is not None else move % num_kv_heads), group[i].clone()
        if j is not None:
            group[j] = other
        inside = torch.nn.functional.one_hot(group, num_kv_heads).to(pairs.dtype)


def descend(cost: Cost, members: Partition, *, unequal: bool = False) -> Partition:
    """Make the best swap (or move) by the true cost between two groups, until none improves."""
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(members)), 2):
            options = list(_changes(members[a], members[b], unequal=unequal))
            found = many(cost, [one for option in options for one in option])
            totals = [left + right for left, right in zip(found[::2], found[1::2], strict=True)]
            now = sum(many(cost, [members[a], members[b]]))
            if options and min(totals) < now - GAIN * abs(now):
                members[a], members[b] = options[totals.index(min(totals))]
                improved = True
    return members


def _changes(left: tuple[int, ...], right: tuple[int, ...], *, unequal: bool) -> list[Pair]:
    """Return two groups after every swap and, if `unequal`, every move between them."""
    made = [
        (tuple(sorted({*left, j} - {i})), tuple(sorted({*right, i} - {j}))) for i, j in itertools.product(left, right)
    ]
    if unequal:
        made += [(tuple(h for h in left if h != i), tuple(sorted({*right, i}))) for i in left if len(left) > 1]
        made += [(tuple(sorted({*left, j})), tuple(h for h in right if h != j)) for j in right if len(right) > 1]
    return made


GROUPING = GroupingMethod(group=group)
