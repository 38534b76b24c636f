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
    shared = heads.groups.group_of_head[query]
    k = project(heads.k[shared], x)
    if heads.key_freedom.normed:
        q, k = normed(q, heads.q, heads.q_gain, query, x, heads), normed(k, heads.k, heads.k_gain, shared, x, heads)
    positions = torch.arange(len(x), dtype=torch.float64)
    scores = rope(q, positions, heads.key_freedom) @ rope(k, positions, heads.key_freedom).T
    return scores.masked_fill(positions[None, :] > positions[:, None], -torch.inf)


def project(rows: Float[Tensor, "dim model_plus_1"], x: Float[Tensor, "token model"]) -> Float[Tensor, "token dim"]:
    """W x + b, the last column being b."""
    return x @ rows[:, :-1].T + rows[:, -1]


def normed(
    one: Tensor, rows: Tensor, gain: Tensor | None, head: int, x: Tensor, heads: Heads
) -> Float[Tensor, "token dim"]:
    """One head's activations after the RMS norm, of that head or of all."""
    if heads.key_freedom.norm_spans_heads:
        together = torch.stack([project(each, x) for each in rows])
        return one / together.square().mean((0, 2))[:, None].sqrt() * (1.0 if gain is None else gain[head])
    return one / one.square().mean(-1, keepdim=True).sqrt() * (1.0 if gain is None else gain)


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
