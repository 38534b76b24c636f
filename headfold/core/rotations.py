"""Rotations of a head that attention does not see, fitted to align one head with another (orthogonal Procrustes)."""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from .heads import Heads, KeyFreedom
from .stats import SiteStats


@dataclass(frozen=True, slots=True)
class PairGrams:
    """E[k_i k_lᵀ] and E[v_i v_lᵀ] of every pair of K/V heads of one site, unweighted; keys are normalised under q/k-norm."""

    k: Float[Tensor, "group dim group dim"]
    v: Float[Tensor, "group value_dim group value_dim"]


def pair_grams(heads: Heads, stats: SiteStats) -> PairGrams:
    """Compute the second moments of the activations of all K and V heads, in float64."""
    second = stats.mean("second")
    k, v = (einsum(t @ second, t, "i a m, l b m -> i a l b") for t in (heads.k.double(), heads.v.double()))
    if heads.key_freedom.normed:
        length = einsum(k, "i a i a -> i a").mean(1).clamp_min(torch.finfo(k.dtype).tiny).sqrt()
        k = k / length[:, None, None, None] / length[None, None, :, None]
    return PairGrams(k, v)


def align_value(cross: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """Return the orthogonal R that maximises tr(R E[x yᵀ]), that is, brings R x nearest to y. `cross` = E[x yᵀ]."""
    left, _, right = torch.linalg.svd(cross)
    return right.mT @ left.mT


def align_key(freedom: KeyFreedom, cross: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """Return the same within the rotations that K may take: an angle (or a sign) per plane, any orthogonal matrix on the other
    dims."""
    rotary = freedom.rotary_dim
    rotation = torch.zeros_like(cross)
    if rotary < len(cross):
        rotation[rotary:, rotary:] = align_value(cross[rotary:, rotary:])
    first, other = freedom.planes().T if rotary else torch.zeros(2, 0, dtype=torch.long)
    # z̄-product of plane f: E[x ȳ]; its phase is the angle from y to x.
    real, imaginary = cross[first, first] + cross[other, other], cross[other, first] - cross[first, other]
    length = torch.hypot(real, imaginary)
    cosine, sine = torch.where(length > 0, real / length, 1.0), torch.where(length > 0, -imaginary / length, 0.0)
    if freedom.normed:
        cosine, sine = torch.where(real < 0, -1.0, 1.0).to(cross.dtype), torch.zeros_like(sine)
    rotation[first, first], rotation[other, other] = cosine, cosine
    rotation[first, other], rotation[other, first] = -sine, sine
    return rotation


def aligned_similarity(
    freedom: KeyFreedom, gram: Float[Tensor, "group dim group dim"], *, keys: bool
) -> Float[Tensor, "group group"]:
    """Return the cosine of every pair of heads after the rotation that aligns them best."""
    num = gram.shape[0]
    norm = torch.einsum("iaia->i", gram).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()  # a dead head is like no other
    similarity = torch.ones(num, num, dtype=gram.dtype)
    for i in range(num):
        for l in range(i):
            cross = gram[i, :, l]
            rotation = align_key(freedom, cross) if keys else align_value(cross)
            similarity[i, l] = similarity[l, i] = torch.einsum("ab,ba->", rotation, cross) / (norm[i] * norm[l])
    return similarity
