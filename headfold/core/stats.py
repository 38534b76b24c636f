"""Statistics of one attention site: additive second moments that calibration measures."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NARROW = 16
"""Positions per input dim below which calibration says little of other data."""


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Sums over calibration tokens; those of several shards or machines add.

    `tensors` holds, by name:
        `second` (model+1, model+1): Σ [x, 1][x, 1]ᵀ of the K/V input x;
        `scatter` (model, model): Σ over sequences of Σ (x − x̄)(x − x̄)ᵀ, with x̄ the mean of the sequence;
        `query_second` (model+1, model+1), at cross-attention: as `second`, of the input of the queries;
        `attended` (group, bin), at sites with RoPE whose attention stock transformers lets one observe: attention mass by distance
            (`core.distances`).
    `count` is the number of tokens of x. The number of tokens of the queries may differ: it is the last element of
    `query_second`.
    """

    tensors: Mapping[str, Tensor]
    count: int

    def __add__(self, other: "SiteStats") -> "SiteStats":
        assert self.tensors.keys() == other.tensors.keys()
        return SiteStats({name: t + other.tensors[name] for name, t in self.tensors.items()}, self.count + other.count)

    def mean(self, name: str) -> Tensor:
        """Return the named sum divided by the number of tokens, in float64."""
        total = self.tensors[name].to(torch.float64)
        return total / (total[-1, -1] if name == "query_second" else self.count)

    def mean_input(self) -> Tensor:
        """Return the mean of [x, 1] in float64: the last column of the mean of `second`, without the others."""
        return self.tensors["second"][:, -1].to(torch.float64) / self.count

    @classmethod
    def from_gains(cls, gains: Float[Tensor, " model"]) -> "SiteStats":
        """Return what the gains of the norm before a site imply: independent inputs with mean zero and these root mean squares."""
        energy = gains.to(torch.float64).square()
        return cls({"second": torch.diag(torch.cat([energy, energy.new_ones(1)])), "scatter": torch.diag(energy)}, 1)

    @classmethod
    def isotropic(cls, model: int) -> "SiteStats":
        """Return what is assumed without any measurement: white inputs of mean zero, so that methods work on the weights alone."""
        second = torch.eye(model + 1, dtype=torch.float64)
        return cls({"second": second, "scatter": second[:model, :model].clone()}, 1)
