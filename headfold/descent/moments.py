"""Second moments of the inputs of a site's projections, in which a descent takes its steps (`whitened.py`)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.heads import Heads
from ..core.products import self_product

Moments = Mapping[str, Tensor]
"""Σ x xᵀ of the inputs x: with a 1 at their end of `q` and of `v` (and `k`), and of `o`."""

_POSITIONS_PER_DIM = 8
"""Positions per input dim from which they are taken."""


def empty_moments(heads: Heads) -> dict[str, Tensor]:
    """Return zeros to add to."""
    sizes = {"q": heads.q.shape[2], "v": heads.v.shape[2], "o": heads.o.shape[:2].numel()}
    return {field: torch.zeros(size, size, device=heads.o.device, dtype=heads.o.dtype) for field, size in sizes.items()}


def num_wanted(moments: Moments) -> int:
    """Return the number of positions that they are to be taken from."""
    return _POSITIONS_PER_DIM * max(map(len, moments.values()))


@torch.no_grad()
def add_moments(moments: dict[str, Tensor], field: str, inputs: Float[Tensor, "position size"]) -> None:
    """Add the inputs of one projection."""
    x = inputs.to(moments[field].dtype)
    moments[field] += self_product(x if field == "o" else torch.cat([x, x.new_ones(len(x), 1)], 1))
