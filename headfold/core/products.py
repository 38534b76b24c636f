"""Products of matrices that a general routine does not know to be symmetric."""

import torch
from jaxtyping import Float
from torch import Tensor

_SPLIT_FROM = 256
"""Columns from which two halves take less time than the whole."""


def self_product(x: Float[Tensor, "row n"]) -> Float[Tensor, "n n"]:
    """Return xᵀx. The block of its upper right is not computed again for its lower left: three quarters of the work. Not for
    autograd.
    """
    size = x.shape[1]
    if size < _SPLIT_FROM:
        return x.T @ x
    half = size // 2
    left, right = x[:, :half], x[:, half:]
    product = x.new_empty(size, size)
    torch.mm(left.T, left, out=product[:half, :half])
    torch.mm(right.T, right, out=product[half:, half:])
    torch.mm(left.T, right, out=product[:half, half:])
    product[half:, :half] = product[:half, half:].T
    return product
