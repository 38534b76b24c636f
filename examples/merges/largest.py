"""Keep the K/V head with the largest keys in each group, a variant of the first head of GQA (2305.13245, figure 4).

Minimises nothing: an example of a merge, and a baseline. It takes time linear in the number of weights. Exact only where the heads
of a group are equal.
"""

from headfold.core.groups import Groups
from headfold.core.heads import Heads
from headfold.core.methods import MergeMethod
from headfold.core.stats import SiteStats


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """Return heads with one K/V head per group; q and o are unchanged. `groups` partitions the K/V heads of the original."""
    sizes = heads.k.double().square().sum((1, 2)).tolist()
    kept = [max(members, key=lambda head: sizes[head]) for members in groups.members]
    return heads.kept(kept, groups)


MERGE = MergeMethod(merge=merge, undoes="copies", transforms_queries=False)
