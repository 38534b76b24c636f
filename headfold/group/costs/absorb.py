"""The error that absorb predicts for a shared head: K (logit²) and V (output²), each relative to the site's energy.

cost = key_weight · K error / K energy + value_weight · V error / V energy (docs/absorb.md). The two errors have different units,
so each is divided by its site's own energy first; the default weights were chosen by measurement (benchmarks/quality.py --rows
ablation), not derived.
"""

from jaxtyping import Float, Int
from torch import Tensor

from ...core.costs import Cost, SetCost
from ...core.heads import Heads
from ...core.methods import CostMethod
from ...core.moments import Moments, site_moments
from ...core.predict import predicted_errors, site_energy
from ...core.stats import SiteStats

LARGE = 1024
"""Dims of a group's values above which they are left out under RoPE: an eigenproblem of that size takes a second for every set."""


def cost(heads: Heads, stats: SiteStats, *, key_weight: float = 1.0, value_weight: float = 1.0) -> Cost:
    """Return the cost of a set of K/V heads that share a single head."""
    return cost_from_moments(site_moments(heads, stats), key_weight=key_weight, value_weight=value_weight)


def cost_from_moments(
    moments: Moments, *, key_weight: float = 1.0, value_weight: float = 1.0, head_dim_multiple: int = 1
) -> Cost:
    """Return the same cost from moments that are computed already; `head_dim_multiple` as in `core.predict`."""
    energy = site_energy(moments)
    dim = moments.values.gram.shape[1]

    def compute(sets: Int[Tensor, "set member"]) -> Float[Tensor, " set"]:
        # Where all of K rotates, V loses far less and takes by far the most time to predict.
        without_values = moments.keys is None and sets.shape[1] * dim > LARGE
        keys, values = predicted_errors(
            moments, sets, values=value_weight != 0 and not without_values, head_dim_multiple=head_dim_multiple
        )
        return key_weight * keys / energy.key + value_weight * values / energy.value

    return SetCost(compute)


COST = CostMethod(
    cost=cost,
    undoes="key_freedom",
    cost_from_moments=cost_from_moments,
    statistics=frozenset({"second", "scatter"}),
    head_dim_multiples=True,
)
