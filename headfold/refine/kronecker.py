"""Damped Kronecker products of covariances, by which fits of W_q and W_v are preconditioned."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "head dim size"]


def damped(matrices: Float[Tensor, "*head n n"], damping: float) -> Float[Tensor, "*head n n"]:
    """Return the matrices with `damping` times their mean energy added to the diagonal."""
    energy = matrices.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return matrices + damping * energy[..., None, None] * eye


def inverse(left: Float[Tensor, "head dim dim"], right: Float[Tensor, "size size"]) -> Callable[[Rows], Rows]:
    """Return the inverse of rows ↦ left · rows · right as a function; it computes in float64."""
    left, right = torch.linalg.cholesky(left), torch.linalg.cholesky(right)

    def solve(rows: Rows) -> Rows:
        return torch.cholesky_solve(torch.cholesky_solve(rows.double(), left).mT, right).mT.to(rows.dtype)

    return solve
