"""Draw new K and V projections, to be trained (GQA, 2305.13245, figure 4: random initialisation).

Each projection is normal with the standard deviation of the source's (the paper names no scale); biases are zero. A baseline for
uptraining: without training the model is destroyed.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.groups import Groups
from ..core.heads import Heads
from ..core.methods import MergeMethod
from ..core.stats import SiteStats


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """Return heads with random K/V heads. Groups of one head keep it. `groups` partitions the source's K/V heads."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (_draw(rows, groups, generator) for rows in (heads.k, heads.v))
    return dataclasses.replace(heads, k=k, v=v, k_gain=heads.mean_k_gain(groups), groups=heads.groups.compose(groups))


def _draw(
    source: Float[Tensor, "source_group dim model"], groups: Groups, generator: torch.Generator
) -> Float[Tensor, "group dim model"]:
    shape = (groups.num_kv_heads, *source.shape[1:])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * source[..., :-1].to(torch.float64).std()
    drawn[..., -1] = 0
    drawn = drawn.to(source.dtype)
    for group, members in enumerate(groups.members):
        if len(members) == 1:
            drawn[group] = source[members[0]]
    return drawn


MERGE = MergeMethod(merge=merge, undoes="nothing", transforms_queries=False)
