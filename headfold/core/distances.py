"""How far back attention looks: shares of its mass by distance, and rotations averaged over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

NUM_SINGLE = 64
"""Distances below this have a bin each; every further bin is wider than the one before it."""
GROWTH = 1.05
LONGEST = 2**22
NEAR = 8.0
"""The assumed mass falls as 1 / (distance + `NEAR`), so that every octave has the same share."""
ASSUMED_SHARE = 0.2
"""Share of the assumed mass that is added to the measured one, so that no distance up to the context length has weight zero."""


@cache
def edges() -> tuple[int, ...]:
    """Return the first distance of every bin, and the end of the last one."""
    found = list(range(NUM_SINGLE + 1))
    while found[-1] < LONGEST:
        found.append(max(found[-1] + 1, round(found[-1] * GROWTH)))
    return tuple(found)


NUM_BINS = len(edges()) - 1


def bin_of(distance: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return the number of the bin of each distance."""
    return torch.bucketize(distance, torch.tensor(edges()[1:-1], device=distance.device), right=True)


@dataclass(frozen=True, slots=True)
class Distances:
    """Shares of the attention mass by distance, one row per K/V head. Within a bin, all distances have the same weight."""

    shares: Float[Tensor, "group bin"]

    @classmethod
    def assumed(cls, num_kv_heads: int, context: int) -> "Distances":
        """Return what is assumed where nothing was measured: the mass falls with the distance, and fewer pairs of tokens have a
        distance near the context length."""
        first, end = (torch.tensor(side, dtype=torch.float64) for side in (edges()[:-1], edges()[1:]))
        middle = (first + end - 1) / 2
        mass = (context - middle).clamp_min(0) / (middle + NEAR) * (end - first)
        return cls((mass / mass.sum()).expand(num_kv_heads, -1))

    @classmethod
    def measured(cls, mass: Float[Tensor, "group bin"], context: int) -> "Distances":
        """Return the mass that calibration measured, mixed with `ASSUMED_SHARE` of the assumed one."""
        assumed, total = cls.assumed(len(mass), context).shares, mass.double().sum(1, keepdim=True)
        own = torch.where(total > 0, mass.double() / total, assumed)
        return cls((1 - ASSUMED_SHARE) * own + ASSUMED_SHARE * assumed)

    def of(self, members: Sequence[int]) -> "Distances":
        """Return the rows of some K/V heads."""
        return Distances(self.shares[list(members)])

    def average(self, frequency: Float[Tensor, "*shape"]) -> Complex[Tensor, "group *shape"]:
        """Return E[exp(−j · frequency · distance)]: the mean of rotations by `frequency` radians per token."""
        used = self.shares.amax(0) > 0
        first, end = (torch.tensor(side, dtype=torch.float64)[used] for side in (edges()[:-1], edges()[1:]))
        angle = frequency.double()[..., None]
        size = end - first
        half = torch.sin(angle / 2)
        # The mean over the distances of a bin is a geometric series.
        inside = torch.where(half.abs() < 1e-9, 1.0, torch.sin(size * angle / 2) / (size * half))
        terms = inside * torch.polar(torch.ones_like(inside), -angle * (first + end - 1) / 2)
        return torch.einsum("gb,...b->g...", self.shares[:, used].to(terms.dtype), terms)
