"""How many queries of a site the refit of W_q sees, and how often: what it computes and what a fold is estimated to take agree on it."""

QUERY_STEPS = 2
"""Conjugate gradient steps for W_q. On SmolLM2, one seed, more steps gave a smaller error of the output of the first sites, and a
larger loss of the model.
"""
_SLOPE, _CURVATURE, _SEARCH = 2**14, 2**12, 2**11
"""Queries, over all processes, that the gradient, the curvature and the search along the step see."""
_SLOPE_PER_DIM, _CURVATURE_PER_DIM = 32, 16
"""The first two see at least so many per input dim."""


def num_sampled_queries(total: float, dims: int) -> tuple[int, int, int]:
    """Return how many of a site's queries the gradient, the curvature and the search are to see; there may be fewer."""
    # A larger part of few data would cost more than all other fits together.
    slope = min(_SLOPE, max(_CURVATURE, int(total) // 4))
    return max(slope, _SLOPE_PER_DIM * dims), max(_CURVATURE, _CURVATURE_PER_DIM * dims), _SEARCH
