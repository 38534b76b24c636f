"""Rotary position as the target class computes it: planes (2f, 2f + 1) that turn by base^(−2f / dims) radians per token."""

import torch
from jaxtyping import Float
from torch import Tensor


def frequencies(base: float, rotary_dim: int) -> Float[Tensor, " plane"]:
    """Return radians per token of every plane, in float64."""
    return base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def rotated(x: Float[Tensor, "*batch token dim"], turns: Float[Tensor, " plane"]) -> Float[Tensor, "*batch token dim"]:
    """Return rows turned by their position, the first token at position zero; computed in float32 or better."""
    angle = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)[:, None] * turns.to(x.device, torch.float32)
    cosine, sine = angle.cos().to(x), angle.sin().to(x)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1).flatten(-2)
