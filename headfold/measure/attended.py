"""Attention mass by distance. It tells `absorb` how far each frequency plane rotates over the distances that matter."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distances import NUM_BINS, bin_of

QUERIES = 16
"""Queries per sequence that are observed, evenly spaced up to its end: a small part of the work of a forward pass."""


def observe(
    query: Float[Tensor, "sequence head token dim"],
    key: Float[Tensor, "sequence group key dim"],
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Return `attended` (group, bin of `core.distances`): the attention probabilities of some queries, summed over one batch.

    `query` and `key` are after RoPE. `mask` is boolean (true: attend) or additive, (sequence or 1, head or 1, token, key); None
    is causal.
    """
    query, key = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key))
    tokens, keys = query.shape[2], key.shape[2]
    chosen = (torch.arange(1, QUERIES + 1, device=query.device) * tokens // QUERIES - 1).clamp_min(0).unique()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query[:, :, chosen].unflatten(1, (key.shape[1], -1))
    logits = scaling * torch.einsum("sgqtd,sgkd->sgqtk", grouped, key)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distance = chosen[:, None] + (keys - tokens) - torch.arange(keys, device=query.device)
    if mask is None:
        logits = logits.masked_fill(distance < 0, float("-inf"))
    else:
        rows = mask[:, :, chosen, :keys] if mask.shape[2] == tokens else mask[:, :, :, :keys]
        rows = rows.unflatten(1, (key.shape[1], -1)) if rows.shape[1] > 1 else rows[:, :, None]
        logits = logits.masked_fill(~rows, float("-inf")) if rows.dtype == torch.bool else logits + rows
    shares = torch.softmax(logits, -1).nan_to_num(0).sum((0, 2)).flatten(1).double().cpu()
    mass = torch.zeros(key.shape[1], NUM_BINS, dtype=torch.float64)
    return {"attended": mass.index_add_(1, bin_of(distance.abs()).flatten().cpu(), shares)}
