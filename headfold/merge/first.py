"""Keep the first K/V head of each group, drop the others (GQA, 2305.13245, figure 4: first head)."""

import dataclasses

from ..core.groups import Groups
from ..core.heads import Heads
from ..core.methods import MergeMethod
from ..core.stats import SiteStats


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """Return heads with the first K/V head of each group. `groups` partitions the source's K/V heads. Exact only where the heads
    of a group are equal."""
    first = [members[0] for members in groups.members]
    gain = heads.k_gain if heads.k_gain is None or heads.k_gain.ndim == 1 else heads.k_gain[first]
    return dataclasses.replace(
        heads, k=heads.k[first], v=heads.v[first], k_gain=gain, groups=heads.groups.compose(groups)
    )


MERGE = MergeMethod(merge=merge, undoes="copies", transforms_queries=False)
