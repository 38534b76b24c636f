"""Average the K and V projections of each group (GQA, 2305.13245, section 2.1: mean pooling).

Minimises the summed squared distance of each group's K and V weights to one shared head. It changes neither Q nor O. Under RoPE
every head has its own phase, so averaging cancels much of K. Exact only where the heads of a group are equal.
"""

import dataclasses

from ..core.combining import combine, equal_weights
from ..core.groups import Groups
from ..core.heads import Heads
from ..core.methods import MergeMethod
from ..core.stats import SiteStats


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """Return heads with one averaged K/V head per group; q and o are unchanged. `groups` partitions the source's K/V heads."""
    weights = equal_weights(groups)
    k, v = (combine(rows, weights, groups) for rows in (heads.k, heads.v))
    return dataclasses.replace(heads, k=k, v=v, k_gain=heads.mean_k_gain(groups), groups=heads.groups.compose(groups))


MERGE = MergeMethod(merge=merge, undoes="copies", transforms_queries=False)
