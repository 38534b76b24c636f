"""Rotary position embedding of heads (batch, head, token, dim): rotates the first dims, as many as there are angles.

The text below this docstring is copied into checkpoints (`remote.py`), so it changes only on purpose.
"""

import torch
from torch import Tensor


def turn_halves(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Dim i turns with dim i + width / 2; `cos` and `sin` are (batch, token, width)."""
    width = cos.shape[-1]
    turning, passing = heads[..., :width], heads[..., width:]
    first, second = turning.chunk(2, -1)
    return _turned(turning, torch.cat([-second, first], -1), passing, cos, sin)


def turn_pairs(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Dim 2 i turns with dim 2 i + 1; `cos` and `sin` are (batch, token, width), each angle twice."""
    width = cos.shape[-1]
    turning, passing = heads[..., :width], heads[..., width:]
    crossed = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
    return _turned(turning, crossed, passing, cos, sin)


def _turned(turning: Tensor, crossed: Tensor, passing: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = turning * cos[:, None] + crossed * sin[:, None]
    return torch.cat([turned, passing], -1)
