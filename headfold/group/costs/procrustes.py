"""Dissimilarity after the best turn of one head onto another (2412.20677: regrouping by aligned cosine).

cost = Σ over pairs of (1 − cos K) + (1 − cos V), the cosine taken over all calibration activations at once. The paper
groups by K or by V; here both count alike.
"""

from ...core.costs import Cost, of_pairs
from ...core.heads import Heads
from ...core.rotations import aligned_similarity, pair_grams
from ...core.stats import SiteStats


def cost(heads: Heads, stats: SiteStats) -> Cost:
    """Returns the cost of one set of K/V heads sharing a single head."""
    grams = pair_grams(heads, stats)
    similarity = aligned_similarity(heads.key_freedom, grams.k, keys=True) + aligned_similarity(
        heads.key_freedom, grams.v, keys=False
    )
    return of_pairs(2 - similarity)
