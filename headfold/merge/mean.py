"""Average the K and V projections of each group (GQA, 2305.13245, section 2.1: mean pooling).

Minimises the summed squared distance of each group's K and V weights to one shared head. Turns neither Q nor O, so under
RoPE, where every head has a phase of its own, the average cancels. Exact only where the heads of a group are equal.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.groups import Groups
from ..core.heads import Heads
from ..core.stats import SiteStats

READS_QUERIES = False
"""Neither looks at Q and O nor changes them."""


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """`groups` partitions the source's K/V heads. Returns heads with `groups.num_groups` of them; q and o are kept."""
    k, v = (torch.stack([_mean(t, members) for members in groups.members]) for t in (heads.k, heads.v))
    return dataclasses.replace(heads, k=k, v=v, kv_of_query=heads.kv_of_query.compose(groups))


def _mean(rows: Float[Tensor, "group dim m"], members: tuple[int, ...]) -> Float[Tensor, "dim m"]:
    # Half-precision weights are summed in float32 and rounded once.
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows[list(members)].to(wide).mean(0).to(rows.dtype)
