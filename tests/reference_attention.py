"""One causal attention block, plainly from its formulas, in float64: what every merge is measured against."""

import torch
from jaxtyping import Float
from torch import Tensor

from headfold.core.heads import Heads, KeyFreedom

BASE = 100.0
"""RoPE's base: small, so that every plane turns visibly within a few tokens."""


def attention_output(heads: Heads, x: Float[Tensor, "token model"]) -> Float[Tensor, "token model"]:
    """Σ over query heads of softmax(q·k / √dim) v W_o, plus the output bias."""
    heads, x = heads.to(torch.float64), x.double()
    total = torch.zeros_like(x) if heads.o_bias is None else heads.o_bias.expand_as(x).clone()
    for query, shared in enumerate(heads.groups.group_of_head):
        weights = (logits(heads, query, x) / heads.q.shape[1] ** 0.5).softmax(-1)
        total += weights @ project(heads.v[shared], x) @ heads.o[query]
    return total


def logits(heads: Heads, query: int, x: Float[Tensor, "token model"]) -> Float[Tensor, "token token"]:
    """q·k of one query head before the scale, future tokens at minus infinity."""
    q = project(heads.q[query], x)
    k = project(heads.k[heads.groups.group_of_head[query]], x)
    if heads.key_freedom.kind == "signs":
        q, k = rms_norm(q, heads.q_gain), rms_norm(k, heads.k_gain)
    positions = torch.arange(len(x), dtype=torch.float64)
    scores = rope(q, positions, heads.key_freedom) @ rope(k, positions, heads.key_freedom).T
    return scores.masked_fill(positions[None, :] > positions[:, None], -torch.inf)


def project(rows: Float[Tensor, "dim model_plus_1"], x: Float[Tensor, "token model"]) -> Float[Tensor, "token dim"]:
    """W x + b, the last column being b."""
    return x @ rows[:, :-1].T + rows[:, -1]


def rms_norm(x: Float[Tensor, "token dim"], gain: Float[Tensor, " dim"] | None) -> Float[Tensor, "token dim"]:
    scaled = x / x.square().mean(-1, keepdim=True).sqrt()
    return scaled if gain is None else scaled * gain


def rope(x: Float[Tensor, "token dim"], positions: Float[Tensor, " token"], freedom: KeyFreedom) -> Tensor:
    """The first `rotary_dim` dims rotate: plane f by position · BASE^(−2f / rotary_dim); its dims are (2f, 2f+1) or halves."""
    rotary = freedom.rotary_dim
    turning, rest = x[:, :rotary], x[:, rotary:]
    angle = positions[:, None] * BASE ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))
    if freedom.interleaved:
        a, b = turning[:, 0::2], turning[:, 1::2]
    else:
        a, b = turning[:, : rotary // 2], turning[:, rotary // 2 :]
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    joined = torch.stack(turned, -1).flatten(1) if freedom.interleaved else torch.cat(turned, -1)
    return torch.cat([joined, rest], -1)
