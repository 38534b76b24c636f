"""Rotary position embedding of heads (batch, head, token, dim): rotates the first dims, as many as there are angles.

The text below this docstring is copied into checkpoints (`remote.py`), so it changes only on purpose.
"""

import torch
from torch import Tensor


def turn_halves(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dim i with dim i + rotary_dim / 2; `cos` and `sin` are (batch, token, rotary_dim)."""
    rotary_dim = cos.shape[-1]
    rotated_part, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    first, second = rotated_part.chunk(2, -1)
    return _rotated(rotated_part, torch.cat([-second, first], -1), rest, cos, sin)


def turn_pairs(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dim 2 i with dim 2 i + 1; `cos` and `sin` are (batch, token, rotary_dim), with each angle twice."""
    rotary_dim = cos.shape[-1]
    rotated_part, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    crossed = torch.stack([-rotated_part[..., 1::2], rotated_part[..., ::2]], -1).flatten(-2)
    return _rotated(rotated_part, crossed, rest, cos, sin)


def _rotated(rotated_part: Tensor, crossed: Tensor, rest: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = rotated_part * cos[:, None] + crossed * sin[:, None]
    return torch.cat([rotated, rest], -1)
