"""Weight-sharing error: squared distance of the heads' K and V weights from their mean (QCQA, 2406.10247).

cost = Σ over the members of ‖W_k − mean W_k‖² + ‖W_v − mean W_v‖², biases included, with the mean over the members alone. It uses
no data and no label of a group. (The public reproduction multiplies by the label, and takes means over non-members too.) It does
not use what reads K and V: heads that differ by a rotation that attention does not see cost as much as unrelated ones.
"""

from ...core.costs import Cost, around_mean
from ...core.heads import Heads
from ...core.methods import CostMethod
from ...core.stats import SiteStats


def cost(heads: Heads, stats: SiteStats | None = None) -> Cost:
    """Return the cost of a set of K/V heads that share a single head."""
    k, v = (tensor.double().flatten(1) for tensor in (heads.k, heads.v))
    return around_mean(k @ k.T + v @ v.T)


COST = CostMethod(cost=cost, undoes="copies", statistics=frozenset())
