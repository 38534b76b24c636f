"""Keep the first K/V head of each group, drop the others (GQA, 2305.13245, figure 4: first head)."""

from ..core.groups import Groups
from ..core.heads import Heads
from ..core.methods import MergeMethod
from ..core.stats import SiteStats


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """Return heads with the first K/V head of each group. `groups` partitions the source's K/V heads. Exact only where the heads
    of a group are equal."""
    return heads.kept([members[0] for members in groups.members], groups)


MERGE = MergeMethod(merge=merge, undoes="copies", transforms_queries=False)
