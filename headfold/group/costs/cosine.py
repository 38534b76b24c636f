"""Dissimilarity of activations: 1 − cosine of two heads' keys and values (AsymGQA, 2406.14963).

cost = 2/|g| · Σ over pairs of ½(1 − cos K) + ½(1 − cos V), with the cosine taken over all calibration activations at once, and
keys before RoPE: the squared distance of the normalised activations from their mean. Among groups of one size this ranks
partitions by the mean similarity inside groups, which the paper maximises. Its formula for groups of several sizes was not
available: a mean over all pairs would favour one large group among single heads, a sum over them equal groups; divided by its
size, a group costs what pooling it loses. The paper averages cosines over its data; this is the form that second moments give.
"""

import torch

from ...core.costs import Cost, around_mean
from ...core.heads import Heads
from ...core.methods import CostMethod
from ...core.rotations import pair_grams
from ...core.stats import SiteStats


def cost(heads: Heads, stats: SiteStats) -> Cost:
    """Return the cost of a set of K/V heads that share a single head."""
    grams = pair_grams(heads, stats)
    similarity = torch.zeros(heads.num_kv_heads, heads.num_kv_heads, dtype=torch.float64)
    for gram in (grams.k, grams.v):
        inner = torch.einsum("iala->il", gram)
        length = torch.diagonal(inner).clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
        similarity += inner / (length[:, None] * length) / 2
    return around_mean(similarity)


COST = CostMethod(cost=cost, undoes="copies")
