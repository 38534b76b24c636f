"""Rotate the heads of a group onto each other, then average them (2412.20677, section 3; generalised Procrustes).

Minimises the summed squared distance of the aligned K and V activations to their mean, over rotations that attention does not
see: any orthogonal matrix on V and on K without position, one angle per frequency plane on K under RoPE, one sign per plane under
q/k-norm. All heads are rotated to the first, then to the running mean until the objective stops improving; the inverse rotations
are folded into W_q and W_o. We call "member" what the paper calls a head of the group. It undoes rotations only: exact for heads
that differ by those. `norm=true` also restores the length that averaging loses (the shared head gets the mean energy of its
members), which the paper does not do and which helps without training.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UserError
from ..core.groups import Groups
from ..core.heads import Heads
from ..core.methods import MergeMethod
from ..core.rotations import align_key, align_value, pair_grams
from ..core.stats import SiteStats


def merge(
    heads: Heads,
    groups: Groups,
    stats: SiteStats | None = None,
    *,
    seed: int = 0,
    norm: bool = False,
    iterations: int = 100,
) -> Heads:
    """Return merged heads, computed in float64 and of that dtype. `groups` partitions the source's K/V heads.

    Raises:
        UserError: there are no statistics.
    """
    if stats is None:
        raise UserError(
            "procrustes needs calibration statistics: run headfold calibrate and pass --stats, or choose --merge mean"
        )
    heads = heads.to(torch.float64)
    grams = pair_grams(heads, stats)
    rotation_k, rotation_v = _identity_rotations(heads.k), _identity_rotations(heads.v)
    k, v = [], []
    for members in groups.members:
        index = list(members)
        rotation_k[index] = _rotations(lambda cross: align_key(heads.key_freedom, cross), grams.k, index, iterations)
        rotation_v[index] = _rotations(align_value, grams.v, index, iterations)
        k.append(_average(heads.k[index], rotation_k[index], grams.k[index][:, :, index], norm))
        v.append(_average(heads.v[index], rotation_v[index], grams.v[index][:, :, index], norm))
    reads = torch.tensor(heads.groups.group_of_head)
    return dataclasses.replace(
        heads,
        q=rotation_k[reads] @ heads.q,
        o=rotation_v[reads] @ heads.o,
        k=torch.stack(k),
        v=torch.stack(v),
        k_gain=heads.mean_k_gain(groups),
        groups=heads.groups.compose(groups),
    )


def _identity_rotations(rows: Float[Tensor, "group dim m"]) -> Float[Tensor, "group dim dim"]:
    return torch.eye(rows.shape[1], dtype=rows.dtype).repeat(len(rows), 1, 1)


def _rotations(
    align: Callable[[Tensor], Tensor], gram: Tensor, members: list[int], iterations: int
) -> Float[Tensor, "member dim dim"]:
    """Return R_i with R_i k_i aligned: first to member 0, then to the mean of the rotated members until nothing improves."""
    blocks = gram[members][:, :, members]
    rotations = torch.stack([align(blocks[i, :, 0]) for i in range(len(members))])
    before = _agreement(rotations, blocks)
    for _ in range(iterations):
        # E[k_i m̄ᵀ] for the running mean m̄ of the rotated members.
        to_mean = torch.einsum("ialb,lcb->iac", blocks, rotations) / len(members)
        rotations = torch.stack([align(to_mean[i]) for i in range(len(members))])
        after = _agreement(rotations, blocks)
        if after - before <= 1e-5 * before.abs():
            break
        before = after
    return rotations


def _agreement(rotations: Tensor, blocks: Tensor) -> Tensor:
    """Return the energy of the sum of the rotated members, which the alignment maximises."""
    return torch.einsum("iab,ibld,lad->", rotations, blocks, rotations)


def _average(rows: Tensor, rotations: Tensor, blocks: Tensor, norm: bool) -> Float[Tensor, "dim m"]:
    """Return the mean of the rotated members, with their mean energy if `norm`."""
    shared = (rotations @ rows).mean(0)
    if not norm:
        return shared
    mean_energy = torch.einsum("iaia->", blocks) / len(rows)
    left = _agreement(rotations, blocks) / len(rows) ** 2
    return shared * (mean_energy / left).sqrt() if left > 0 else shared


MERGE = MergeMethod(merge=merge, undoes="rotations", statistics=frozenset({"second"}))
