"""Dissimilarity of activations as they are: 1 − cosine of two heads' keys and values (AsymGQA, 2406.14963).

cost = Σ over pairs of ½(1 − cos K) + ½(1 − cos V), the cosine taken over all calibration activations at once, keys before RoPE.
The paper averages cosines over its data; its formula was not at hand in full, and this is the form that second moments give.
"""

import torch

from ...core.costs import Cost, of_pairs
from ...core.heads import Heads
from ...core.rotations import pair_grams
from ...core.stats import SiteStats


def cost(heads: Heads, stats: SiteStats) -> Cost:
    """Returns the cost of one set of K/V heads sharing a single head."""
    grams = pair_grams(heads, stats)
    similarity = torch.zeros(heads.num_groups, heads.num_groups, dtype=torch.float64)
    for gram in (grams.k, grams.v):
        inner = torch.einsum("iala->il", gram)
        length = torch.diagonal(inner).clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
        similarity += inner / (length[:, None] * length) / 2
    return of_pairs(1 - similarity)
