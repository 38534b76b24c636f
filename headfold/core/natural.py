"""The basis of a shared key in which it is nearest to a member's own.

A shared key and its read-outs may be multiplied by any matrix that position allows, and its inverse, without a change of any logit. Without
norms that choice means nothing. A norm divides by the root mean square of all dims, so under one it is made such that what the norm sees of
the shared key is what it saw of the members': heads that differ by signs get back exactly the key that they share.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from .heads import KeyFreedom
from .moments import WholeKeys, roots


def plane_blocks(freedom: KeyFreedom, factors: Complex[Tensor, "row plane"]) -> Float[Tensor, "row rotary rotary"]:
    """Return multiplication by a complex number per plane as real 2 × 2 blocks."""
    first, other = freedom.planes().T
    blocks = factors.real.new_zeros(len(factors), freedom.rotary_dim, freedom.rotary_dim)
    blocks[:, first, first], blocks[:, other, other] = factors.real, factors.real
    blocks[:, first, other], blocks[:, other, first] = -factors.imag, factors.imag
    return blocks


def natural_basis(
    freedom: KeyFreedom,
    keys: WholeKeys,
    members: list[int],
    mix: Float[Tensor, "dim member_times_dim"],
    readout: Float[Tensor, "member dim dim"],
) -> tuple[Float[Tensor, "dim member_times_dim"], Float[Tensor, "member dim dim"]]:
    """Return the shared key and its read-outs in the natural basis.

    Each plane gets the mean energy of the members', weighted by their queries, and the phase of the member of which it keeps most; dims
    without position get the covariance of the first member.
    """
    gram = keys.second[members][:, :, members]
    queries = torch.diagonal(keys.queries[members], dim1=1, dim2=2)
    dim, rotary = readout.shape[1], freedom.rotary_dim
    cross = (mix @ gram.flatten(2).flatten(0, 1)).unflatten(
        1, (len(members), dim)
    )  # E[z y_i], (shared dim, member, dim)
    second = cross.flatten(1) @ mix.mT
    basis = torch.zeros_like(second)
    first, other = freedom.planes().T
    energy = torch.stack([torch.diagonal(gram[i, :, i]) for i in range(len(members))])
    of_queries, of_members = (t[:, first] + t[:, other] for t in (queries, energy))
    product = torch.complex(
        cross[first, :, first] + cross[other, :, other], cross[first, :, other] - cross[other, :, first]
    )  # E[y_i z̄], (plane, member)
    best = (of_queries.mT * product.abs()).argmax(1, keepdim=True)
    phase = torch.nn.functional.normalize(torch.view_as_real(product.gather(1, best)[:, 0]), dim=-1)
    wanted = (of_queries * of_members).sum(0) / of_queries.sum(0)
    found = torch.diagonal(second)[first] + torch.diagonal(second)[other]
    used = (found > 0) & (wanted > 0) & (phase.abs().sum(-1) > 0)
    phase = torch.where(used[:, None], phase, phase.new_tensor([1.0, 0.0]))
    size = torch.where(used, wanted / torch.where(used, found, 1.0), 1.0).sqrt()
    factors = torch.view_as_complex(phase.contiguous()) * size
    basis[:rotary, :rotary] = plane_blocks(freedom, factors[None])[0]
    if rotary < dim:
        basis[rotary:, rotary:] = _aligned(
            second[rotary:, rotary:], gram[0, rotary:, 0, rotary:], cross[rotary:, 0, rotary:]
        )
    return basis @ mix, readout @ torch.linalg.pinv(basis)


def _aligned(
    found: Float[Tensor, "dim dim"], wanted: Float[Tensor, "dim dim"], cross: Float[Tensor, "dim dim"]
) -> Float[Tensor, "dim dim"]:
    """Return the matrix that gives z of second moment `found` that of y, and brings it nearest to y; `cross` is E[z yᵀ]."""
    (colour, whiten_y), (_, whiten_z) = (roots(moment[None]) for moment in (wanted, found))
    left, _, right = torch.linalg.svd(whiten_y[0] @ cross.mT @ whiten_z[0])
    return colour[0] @ left @ right @ whiten_z[0]
