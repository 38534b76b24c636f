"""Weight-sharing error: squared distance of the heads' K and V weights from their mean (QCQA, 2406.10247).

cost = Σ over the members of ‖W_k − mean W_k‖² + ‖W_v − mean W_v‖², biases included, the mean over the members alone. It depends on no
data and on no label of a group. (The public reproduction multiplies by the label, and takes means over non-members too.)
It knows nothing of what reads K and V: heads that differ by a rotation which attention does not see cost as much as strangers.
"""

from ...core.costs import Cost, around_mean
from ...core.heads import Heads
from ...core.methods import CostMethod
from ...core.stats import SiteStats


def cost(heads: Heads, stats: SiteStats | None = None) -> Cost:
    """Returns the cost of one set of K/V heads sharing a single head."""
    rows = [tensor.double().flatten(1) for tensor in (heads.k, heads.v)]
    return around_mean(sum(row @ row.T for row in rows))


COST = CostMethod(cost=cost, undoes="copies", statistics=frozenset())
