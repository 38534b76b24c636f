"""Equal runs of neighbouring heads (GQA, 2305.13245, section 2.1)."""

from collections.abc import Callable

from ..core.groups import Groups
from ..core.methods import GroupingMethod


def group(
    cost: Callable[[tuple[int, ...]], float] | None, num_heads: int, num_kv_heads: int, *, seed: int = 0
) -> Groups:
    """Return `num_kv_heads` equal runs of `num_heads` heads; the cost is not used."""
    return Groups.contiguous(num_heads, num_kv_heads)


GROUPING = GroupingMethod(group=group, default_cost=None)
