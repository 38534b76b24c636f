"""QCQA as published (2406.10247): NSGA-II on the weight-sharing error; groups of equal size, or `unequal=true` of any.

QCQA-EC evolves an order of the heads cut into equal blocks, QCQA-AC a label per head, with a population of 100 over 10
generations, simulated binary crossover at 0.9 and polynomial mutation, as in the first author's reproduction. The error is
computed over the members alone (see the page of the cost `wse`). Its second stage, which chooses the layers to group, is
`--spread qcqa`. With `--merge mean` this is the whole method. A patent application (US 2025/0021819 A1, Intel) covers
evolutionary grouping on two objectives with a fall-back by error: this page is for comparison, and nothing uses it by default.
Needs pymoo: `pip install 'headfold[evolve]'`.
"""

from ..core.costs import Cost
from ..core.groups import Groups
from ..core.methods import GroupingMethod
from . import evolve


def group(
    cost: Cost,
    num_heads: int,
    num_kv_heads: int,
    *,
    seed: int = 1234,
    unequal: bool = False,
    population: int = 100,
    generations: int = 10,
) -> Groups:
    """Return `num_kv_heads` groups of `num_heads` heads, equal unless `unequal`. `cost` takes the sorted heads of one group.

    Raises:
        UserError: pymoo is not installed.
    """
    return evolve.group(
        cost, num_heads, num_kv_heads, seed=seed, unequal=unequal, population=population, generations=generations
    )


GROUPING = GroupingMethod(group=group, default_cost="wse")
