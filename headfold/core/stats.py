"""What calibration remembers of one attention site: additive second moments."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Sums over calibration tokens, so that shards and machines add.

    `tensors` holds, by the name of the measure that made them, at least
    `second` (model+1, model+1): Σ [x, 1][x, 1]ᵀ of the K/V input x;
    `scatter` (model, model): Σ over sequences of Σ (x − x̄)(x − x̄)ᵀ with x̄ the sequence's own mean;
    cross-attention also `query_second`, as `second` but of the input of the queries; sites that rotate, where stock transformers lets
    it be seen, `attended` (group, bin): attention mass by distance (`core.distances`).
    `count` is the number of tokens of x. The queries' own number need not be the same: their sum's last element is it.
    """

    tensors: Mapping[str, Tensor]
    count: int

    def __add__(self, other: "SiteStats") -> "SiteStats":
        assert self.tensors.keys() == other.tensors.keys()
        return SiteStats({name: t + other.tensors[name] for name, t in self.tensors.items()}, self.count + other.count)

    def mean(self, name: str) -> Tensor:
        """The named sum divided by the number of tokens, in float64."""
        total = self.tensors[name].to(torch.float64)
        return total / (total[-1, -1] if name == "query_second" else self.count)

    @classmethod
    def from_gains(cls, gains: Float[Tensor, " model"]) -> "SiteStats":
        """What the gains of the norm before a site say alone: independent inputs of mean zero and these root mean squares."""
        energy = gains.to(torch.float64).square()
        return cls({"second": torch.diag(torch.cat([energy, energy.new_ones(1)])), "scatter": torch.diag(energy)}, 1)

    @classmethod
    def isotropic(cls, model: int) -> "SiteStats":
        """What to assume where nothing was measured: white inputs of mean zero. Weight space, in other words."""
        second = torch.eye(model + 1, dtype=torch.float64)
        return cls({"second": second, "scatter": second[:model, :model].clone()}, 1)
