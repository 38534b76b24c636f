"""Draw fresh K and V projections, to be trained (GQA, 2305.13245, figure 4: random initialisation).

Each projection is normal with the standard deviation of the source's own (the paper names no scale); biases start at zero.
A baseline for uptraining: without training it destroys the model.
"""

import dataclasses

import torch

from ..core.groups import Groups
from ..core.heads import Heads
from ..core.methods import MergeMethod
from ..core.stats import SiteStats


def merge(heads: Heads, groups: Groups, stats: SiteStats | None = None, *, seed: int = 0) -> Heads:
    """`groups` partitions the source's K/V heads. Groups of one head keep it: there is nothing to share."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {name: _draw(getattr(heads, name), groups, generator) for name in ("k", "v")}
    return dataclasses.replace(heads, **fresh, groups=heads.groups.compose(groups))


def _draw(source: torch.Tensor, groups: Groups, generator: torch.Generator) -> torch.Tensor:
    shape = (groups.num_kv_heads, *source.shape[1:])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * source[..., :-1].to(torch.float64).std()
    drawn[..., -1] = 0
    drawn = drawn.to(source.dtype)
    for group, members in enumerate(groups.members):
        if len(members) == 1:
            drawn[group] = source[members[0]]
    return drawn


MERGE = MergeMethod(merge=merge, undoes="nothing", transforms_queries=False)
