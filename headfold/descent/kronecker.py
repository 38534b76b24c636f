"""Damped Kronecker products of covariances, by which fits of W_q and W_v are preconditioned."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "head dim size"]


def damped(matrices: Float[Tensor, "*head n n"], damping: float) -> Float[Tensor, "*head n n"]:
    """Return the matrices with `damping` times their mean energy added to the diagonal."""
    energy = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    energy = torch.where(energy > 0, energy, 1.0)  # nothing to damp: any scale serves
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return matrices + damping * energy[..., None, None] * eye


def inverse(left: Float[Tensor, "head dim dim"], right: Float[Tensor, "size size"]) -> Callable[[Rows], Rows]:
    """Return the inverse of rows ↦ left · rows · right as a function; it computes in float64.

    Where products of weights near the ends of float32 have overflowed it returns zeros, so that a fit leaves the weights as they are.
    """
    (left, left_failed), (right, right_failed) = torch.linalg.cholesky_ex(left), torch.linalg.cholesky_ex(right)
    if left_failed.any() or right_failed.any():
        return torch.zeros_like

    def solve(rows: Rows) -> Rows:
        return torch.cholesky_solve(torch.cholesky_solve(rows.double(), left).mT, right).mT.to(rows.dtype)

    return solve
