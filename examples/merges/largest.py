"""Keep the K/V head with the longest keys in each group.

Minimises nothing: an example of a merge, and a baseline. Exact only where the heads of a group are equal.
"""

import dataclasses

from headfold.core.groups import Groups
from headfold.core.heads import Heads
from headfold.core.methods import MergeMethod
from headfold.core.stats import SiteStats


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """Return heads with one K/V head per group of `groups`; q and o are kept."""
    kept = [max(members, key=lambda head: float(heads.k[head].norm())) for members in groups.members]
    return dataclasses.replace(heads, k=heads.k[kept], v=heads.v[kept], groups=heads.groups.compose(groups))


MERGE = MergeMethod(merge=merge)
