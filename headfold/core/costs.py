"""Costs of sets of heads, for one set at a time or for many at once."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Cost = Callable[[tuple[int, ...]], float]
"""Maps the sorted heads of one group to its cost."""


class SetCost:
    """A cost that is computed faster for many sets at once; each set is computed once and remembered.

    `cheap` says that the cost is a sum over a table, so that a search may evaluate it as often as it likes.
    """

    def __init__(
        self, compute: Callable[[Int[Tensor, "set member"]], Float[Tensor, " set"]], *, cheap: bool = False
    ) -> None:
        self.cheap = cheap
        self._compute = compute
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, members: tuple[int, ...]) -> float:
        """Return the cost of one sorted set."""
        return self.many([members])[0]

    def many(self, sets: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the costs of sorted sets of any sizes; those of one size are computed together."""
        unknown: dict[int, list[tuple[int, ...]]] = {}
        for members in dict.fromkeys(sets):
            if members not in self._known:
                unknown.setdefault(len(members), []).append(members)
        for same in unknown.values():
            self._known.update(zip(same, self._compute(torch.tensor(same)).tolist(), strict=True))
        return [self._known[members] for members in sets]


def many(cost: Cost, sets: Sequence[tuple[int, ...]]) -> list[float]:
    """Return the costs of many sets, computed together where the cost supports it."""
    return cost.many(sets) if isinstance(cost, SetCost) else [cost(members) for members in sets]


def summed(costs: Sequence[Cost]) -> Cost:
    """Return the sum of the costs of several sites, for a partition that they share."""
    if len(costs) == 1:
        return costs[0]

    def compute(sets: Int[Tensor, "set member"]) -> Float[Tensor, " set"]:
        listed = [tuple(members) for members in sets.tolist()]
        return torch.tensor([many(cost, listed) for cost in costs], dtype=torch.float64).sum(0)

    return SetCost(compute, cheap=all(isinstance(cost, SetCost) and cost.cheap for cost in costs))


def around_mean(gram: Float[Tensor, "head head"]) -> SetCost:
    """Return the cost that sums the squared distances of a set's vectors from their mean, given the vectors' inner products."""
    diagonal = torch.diagonal(gram)
    return SetCost(
        lambda sets: (
            diagonal[sets].sum(1) - gram[sets[:, :, None], sets[:, None, :]].sum((1, 2)) / sets.shape[1]
        ).clamp_min(0),
        cheap=True,
    )


def pair_matrix(cost: Cost, num_heads: int) -> Float[Tensor, "head head"]:
    """Return the cost of every pair of heads; the diagonal is zero."""
    left, right = torch.triu_indices(num_heads, num_heads, offset=1)
    matrix = torch.zeros(num_heads, num_heads, dtype=torch.float64)
    matrix[left, right] = torch.tensor(many(cost, list(zip(left.tolist(), right.tolist(), strict=True)))).double()
    return matrix + matrix.T
