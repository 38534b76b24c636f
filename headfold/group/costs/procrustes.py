"""Dissimilarity after the best turn of one head onto another (2412.20677: regrouping by aligned cosine).

cost = 2/|g| · Σ over pairs of (1 − cos K) + (1 − cos V), the cosine taken over all calibration activations at once: among groups of
one size the order of the summed similarity that the paper raises, and among several, which it does not have, what pooling them
loses, as in `cosine`. The paper groups by K or by V; here both count alike.
"""

from ...core.costs import Cost, around_mean
from ...core.heads import Heads
from ...core.methods import CostMethod
from ...core.rotations import aligned_similarity, pair_grams
from ...core.stats import SiteStats


def cost(heads: Heads, stats: SiteStats) -> Cost:
    """Returns the cost of one set of K/V heads sharing a single head."""
    grams = pair_grams(heads, stats)
    similarity = aligned_similarity(heads.key_freedom, grams.k, keys=True) + aligned_similarity(
        heads.key_freedom, grams.v, keys=False
    )
    return around_mean(similarity)


COST = CostMethod(cost=cost, undoes="rotations")
