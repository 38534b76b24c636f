"""What sets of heads cost, one set at a time or many at once."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Cost = Callable[[tuple[int, ...]], float]
"""The cost of the sorted heads of one group."""


class SetCost:
    """A cost that is cheaper for many sets at once. Every set is computed once.

    `cheap`: it is a sum over a table, so that a search may ask as often as it likes.
    """

    def __init__(
        self, compute: Callable[[Int[Tensor, "set member"]], Float[Tensor, " set"]], *, cheap: bool = False
    ) -> None:
        self.cheap = cheap
        self._compute = compute
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, members: tuple[int, ...]) -> float:
        """Of one sorted set."""
        return self.many([members])[0]

    def many(self, sets: Sequence[tuple[int, ...]]) -> list[float]:
        """Of sorted sets of any sizes, those of one size together."""
        unknown: dict[int, list[tuple[int, ...]]] = {}
        for members in dict.fromkeys(sets):
            if members not in self._known:
                unknown.setdefault(len(members), []).append(members)
        for same in unknown.values():
            self._known.update(zip(same, self._compute(torch.tensor(same)).tolist(), strict=True))
        return [self._known[members] for members in sets]


def many(cost: Cost, sets: Sequence[tuple[int, ...]]) -> list[float]:
    """The costs of many sets, at once where the cost can."""
    return cost.many(sets) if isinstance(cost, SetCost) else [cost(members) for members in sets]


def summed(costs: Sequence[Cost]) -> Cost:
    """The cost of a partition that several sites share."""
    if len(costs) == 1:
        return costs[0]

    def compute(sets: Int[Tensor, "set member"]) -> Float[Tensor, " set"]:
        listed = [tuple(members) for members in sets.tolist()]
        return torch.tensor([many(cost, listed) for cost in costs], dtype=torch.float64).sum(0)

    return SetCost(compute, cheap=all(isinstance(cost, SetCost) and cost.cheap for cost in costs))


def around_mean(gram: Float[Tensor, "head head"]) -> SetCost:
    """Squared distances of a set's vectors from their mean, summed, from the vectors' inner products."""
    diagonal = torch.diagonal(gram)
    return SetCost(
        lambda sets: (
            diagonal[sets].sum(1) - gram[sets[:, :, None], sets[:, None, :]].sum((1, 2)) / sets.shape[1]
        ).clamp_min(0),
        cheap=True,
    )


def pair_matrix(cost: Cost, num_heads: int) -> Float[Tensor, "head head"]:
    """What every two heads cost together; zero on the diagonal."""
    left, right = torch.triu_indices(num_heads, num_heads, offset=1)
    matrix = torch.zeros(num_heads, num_heads, dtype=torch.float64)
    matrix[left, right] = torch.tensor(many(cost, list(zip(left.tolist(), right.tolist(), strict=True)))).double()
    return matrix + matrix.T
