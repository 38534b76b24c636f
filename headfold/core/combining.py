"""Heads of a group as one: their weighted sum. Pooling is the case of equal weights, learned merges (WGQA) that of trained ones."""

import torch
from jaxtyping import Float
from torch import Tensor

from .groups import Groups


def combine(
    rows: Float[Tensor, "head dim model"], weights: Float[Tensor, "head #dim #model"], groups: Groups
) -> Float[Tensor, "group dim model"]:
    """Σ over the heads of each group of `weights` times `rows`, elementwise: one weight for a head, its rows or its columns.

    Half-precision rows are summed in float32 and rounded once. Differentiable in both.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weighed = weights.to(wide) * wide
    if not groups.is_ordered:
        weighed = weighed[list(groups.standard_order())]
    return torch.stack([members.sum(0) for members in weighed.split(groups.sizes)]).to(rows.dtype)


def equal_weights(groups: Groups) -> Float[Tensor, "head 1 1"]:
    """Those of the mean: each head weighs one over the heads of its group; float64."""
    return torch.tensor([1 / groups.sizes[group] for group in groups.group_of_head], dtype=torch.float64)[:, None, None]
