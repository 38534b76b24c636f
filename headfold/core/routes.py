"""How many query heads read each K/V head: runs of a fixed order of heads, and the state that a route keeps between batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from .errors import UserError

ROUNDING = 1e-9
"""Shares of query heads that differ by less are taken as equal."""


@dataclass(frozen=True, slots=True)
class Norms:
    """Norms of the keys of a batch, by K/V head."""

    whole: Float[Tensor, "sample group"]
    """‖K_g‖_F of a sample over positions and dims, padding included, as published."""
    per_token: Float[Tensor, "sample group"]
    """Root mean square over the positions that may be attended to; neither padding nor a sample's length changes it."""


@dataclass(frozen=True, slots=True)
class RouteState:
    """The state of one site's route; every change makes a new one."""

    sizes: tuple[int, ...]
    """The number of query heads of each K/V head, in order."""
    kept: Float[Tensor, " group"]
    """The norms kept from the last change of the groups: c in 2408.08454."""
    mean: Float[Tensor, " group"]
    """Mean norms of the samples measured since then."""
    count: int = 0
    """The number of these samples."""
    step: int = 0
    """Forward passes in training."""
    draws: int = 0
    """Number of times that random numbers were drawn."""

    @property
    def num_heads(self) -> int:
        return sum(self.sizes)

    def with_samples(self, norms: Float[Tensor, "sample group"]) -> "RouteState":
        """Return the state with more samples in the mean."""
        count = self.count + len(norms)
        mean = self.mean + (norms.mean(0).to(self.mean) - self.mean) * (len(norms) / count)
        return replace(self, mean=mean, count=count)


def runs(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the map query head → K/V head that cuts the heads, in order, into runs of these sizes."""
    return tuple(group for group, size in enumerate(sizes) for _ in range(size))


def even(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Return equal sizes; if they cannot be equal, the first ones are larger by one."""
    least, more = divmod(num_heads, num_kv_heads)
    return tuple(least + (group < more) for group in range(num_kv_heads))


def apportion(shares: Sequence[float], num_heads: int) -> tuple[int, ...]:
    """Return sizes that give every group one query head and the others by shares: whole parts first, then by the largest
    remainders (the first of equal ones).

    `shares` are not negative and relative to their sum; if that is 0 all are equal. A larger share never gets fewer heads.
    """
    spare, total = num_heads - len(shares), math.fsum(shares)
    assert spare >= 0 and min(shares) >= 0, (shares, num_heads)
    if total == 0:
        return even(num_heads, len(shares))
    quotas = [spare * (share / total) for share in shares]
    sizes = [1 + math.floor(quota + ROUNDING) for quota in quotas]
    left = [round((quota - size + 1) / ROUNDING) for quota, size in zip(quotas, sizes, strict=True)]
    for group in sorted(range(len(shares)), key=lambda g: -left[g])[: num_heads - sum(sizes)]:
        sizes[group] += 1
    return tuple(sizes)


def published_rounding(where: str, shares: Sequence[float], num_heads: int) -> list[int]:
    """Return round(H · r / Σr), halves to the even number, as published: a group may get none, and the sum may not be
    `num_heads`.

    Raises:
        UserError: all shares are 0, where the published formula is 0/0.
    """
    total = math.fsum(shares)
    if total == 0:
        raise UserError(
            f"{where}: expected key norms that differ, got equal ones, for which the published shares are 0/0; "
            "leave published=true out, and the repaired route gives equal shares"
        )
    return [round(num_heads * share / total) for share in shares]


def min_max(norms: Float[Tensor, " group"]) -> list[float]:
    """Return (n − min n) / (max n − min n); zeros where all are equal."""
    span = norms.max() - norms.min()
    return ((norms - norms.min()) / span if span > 0 else norms * 0).tolist()
