"""Weighted sums of the heads of a group. Mean pooling has equal weights; learned merges (WGQA) train them."""

import torch
from jaxtyping import Float
from torch import Tensor

from .groups import Groups


def combine(
    rows: Float[Tensor, "head dim model"], weights: Float[Tensor, "head #dim #model"], groups: Groups
) -> Float[Tensor, "group dim model"]:
    """Return, for each group, the sum of its heads' `rows` times their `weights`, elementwise.

    A head has one weight, or one for each of its rows or columns. Half-precision rows are summed in float32 and rounded once. The
    result is differentiable in both arguments.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weighed = weights.to(wide) * wide
    if not groups.is_ordered:
        weighed = weighed[list(groups.standard_order())]
    return torch.stack([members.sum(0) for members in weighed.split(groups.sizes)]).to(rows.dtype)


def equal_weights(groups: Groups) -> Float[Tensor, "head 1 1"]:
    """Return the weights of the mean, float64: for each head, one over the number of heads in its group."""
    return torch.tensor([1 / groups.sizes[group] for group in groups.group_of_head], dtype=torch.float64)[:, None, None]
