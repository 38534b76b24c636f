"""Linear algebra of shared heads: leading functionals of a Gram matrix, with or without RoPE."""

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor

NEGLIGIBLE = 1e-12
"""Share of the largest eigenvalue or energy below which a direction counts as unused."""


def used(energy: Tensor) -> Tensor:
    """Return energies that can be divided by: what is negligible beside the largest counts as that much, and 1 where all are zero."""
    largest = energy.amax()
    return energy.clamp_min(NEGLIGIBLE * largest) if largest > 0 else torch.ones_like(energy)


def top_functionals(
    gram: Float[Tensor, "member dim member dim"], num_kept: int
) -> tuple[Float[Tensor, "member dim kept"], Float[Tensor, " kept"]]:
    """Return the `num_kept` leading eigenvectors over all members' directions, and their eigenvalues, largest first."""
    members, dim = gram.shape[:2]
    values, vectors = torch.linalg.eigh(rearrange(gram, "i a l b -> (i a) (l b)"))
    values, vectors = values.flip(0)[:num_kept].clamp_min(0), vectors.flip(1)[:, :num_kept]
    return rearrange(vectors, "(member dim) kept -> member dim kept", dim=dim), values


def top_planes(
    gram: Complex[Tensor, "plane member member"], num_kept: int = 1
) -> tuple[Complex[Tensor, "plane member kept"], Float[Tensor, "plane kept"]]:
    """Return the `num_kept` leading eigenvectors of every plane's Hermitian Gram matrix, and their eigenvalues, largest first."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(2)[..., :num_kept], values.flip(1)[:, :num_kept].clamp_min(0)
