"""How many query heads read each K/V head: cutting their fixed order into runs, and what a route remembers between two cuts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from .errors import UserError

GRAIN = 1e-9
"""Queries; shares that differ by less are rounding, and alike."""


@dataclass(frozen=True, slots=True)
class Norms:
    """How long the keys of a batch are, by K/V head."""

    whole: Float[Tensor, "sample group"]
    """‖K_g‖_F of a sample over positions and dims, padding and all: as published."""
    per_token: Float[Tensor, "sample group"]
    """Root mean square over the positions that may be attended to: padding does not count, nor does a sample's length."""


@dataclass(frozen=True, slots=True)
class RouteState:
    """What one attention's route knows; a new one for every change."""

    sizes: tuple[int, ...]
    """Query heads of each K/V head, in order."""
    kept: Float[Tensor, " group"]
    """The norms that the last cut left behind: c in 2408.08454."""
    mean: Float[Tensor, " group"]
    """Mean norms of the samples measured since,"""
    count: int = 0
    """and how many these are."""
    step: int = 0
    """Forward passes in training."""
    draws: int = 0
    """Times that chance was asked."""

    @property
    def num_heads(self) -> int:
        return sum(self.sizes)

    def measured(self, norms: Float[Tensor, "sample group"]) -> "RouteState":
        """With more samples in the mean."""
        count = self.count + len(norms)
        mean = self.mean + (norms.mean(0).to(self.mean) - self.mean) * (len(norms) / count)
        return replace(self, mean=mean, count=count)


def runs(sizes: Sequence[int]) -> tuple[int, ...]:
    """Query head → K/V head where the heads, in order, are cut into runs of these sizes."""
    return tuple(group for group, size in enumerate(sizes) for _ in range(size))


def even(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Equal sizes, the first ones larger by one where they cannot be."""
    least, more = divmod(num_heads, num_kv_heads)
    return tuple(least + (group < more) for group in range(num_kv_heads))


def apportion(shares: Sequence[float], num_heads: int) -> tuple[int, ...]:
    """One query for every group, the others by their shares: whole parts first, then the largest remainders, the first of equal ones.

    `shares` are not negative and count relative to their sum; where that is 0 all are alike. A larger share never gets fewer.
    """
    spare, total = num_heads - len(shares), math.fsum(shares)
    assert spare >= 0 and min(shares) >= 0, (shares, num_heads)
    if total == 0:
        return even(num_heads, len(shares))
    quotas = [spare * (share / total) for share in shares]
    sizes = [1 + math.floor(quota + GRAIN) for quota in quotas]
    left = [round((quota - size + 1) / GRAIN) for quota, size in zip(quotas, sizes, strict=True)]
    for group in sorted(range(len(shares)), key=lambda g: -left[g])[: num_heads - sum(sizes)]:
        sizes[group] += 1
    return tuple(sizes)


def rounded(where: str, shares: Sequence[float], num_heads: int) -> list[int]:
    """round(H · r / Σr), halves to the even number: as published, so a group may get none, and the sum may miss `num_heads`.

    Raises:
        UserError: all shares are 0, where the published formula is 0/0.
    """
    total = math.fsum(shares)
    if total == 0:
        raise UserError(
            f"{where}: the published shares are 0/0 here: expected key norms that differ, got equal ones; "
            f"leave published=true out, the repaired route shares evenly then"
        )
    return [round(num_heads * share / total) for share in shares]


def spread(norms: Float[Tensor, " group"]) -> list[float]:
    """(n − min n) / (max n − min n); zeros where all are equal."""
    span = norms.max() - norms.min()
    return ((norms - norms.min()) / span if span > 0 else norms * 0).tolist()
