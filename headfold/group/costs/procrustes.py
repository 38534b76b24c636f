"""Dissimilarity of activations after the best rotation of one head onto another (2412.20677: regrouping by aligned cosine).

cost = 2/|g| · Σ over pairs of (1 − cos K) + (1 − cos V), with the cosine taken over all calibration activations at once. Among
groups of one size this ranks partitions by the summed similarity, which the paper maximises; for several sizes, which the paper
does not have, it is what pooling loses, as in `cosine`. The paper groups by K or by V; here both have equal weight.
"""

from ...core.costs import Cost, around_mean
from ...core.heads import Heads
from ...core.methods import CostMethod
from ...core.rotations import aligned_similarity, pair_grams
from ...core.stats import SiteStats


def cost(heads: Heads, stats: SiteStats) -> Cost:
    """Return the cost of a set of K/V heads that share a single head."""
    grams = pair_grams(heads, stats)
    similarity = aligned_similarity(heads.key_freedom, grams.k, keys=True) + aligned_similarity(
        heads.key_freedom, grams.v, keys=False
    )
    return around_mean(similarity)


COST = CostMethod(cost=cost, undoes="rotations")
