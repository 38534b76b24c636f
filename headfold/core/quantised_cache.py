"""Rotations of K and V under which a quantised cache rounds less, undone in W_q and W_o.

Such a cache gives the dims of a head, or 32 to 64 of them, one scale for each token, so one dim with large numbers makes the rounding of
all others coarse. V may take any orthogonal matrix: a Hadamard matrix with random signs spreads what is large over all dims, and so it
does for dims of K without position. Under RoPE an angle per frequency plane is free. Keys have a mean that is far larger in some slowly
rotating planes than all that varies: turned halfway between the two dims of its plane, it makes the largest number smaller by up to √2,
and as all means are positive then, the offset of a group takes a part of them. (An engine that itself rotates keys by a Hadamard matrix
adds them up to one large number.) Scales are left as they are: those that equalise the dims lose no less (docs/results/cache.md).
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from .heads import Heads, KeyFreedom


def rotated_for_cache(heads: Heads, mean_input: Float[Tensor, " model_plus_1"], slot_dim: int, seed: int) -> Heads:
    """Return the same function, in float64, with every K and V head rotated for a quantised cache.

    `mean_input` is the mean of [x, 1] at the K/V input. `slot_dim` is the head_dim of the original: the dims of K that rotate as one
    head of it do, where K heads have a multiple of that. Keys that pass a norm stay as they are. `seed` draws the signs.
    """
    heads = heads.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    on_v = flat_rotation(heads.v.shape[1], generator)
    means = (heads.k @ mean_input.to(heads.k)).unflatten(1, (-1, slot_dim))
    on_k = torch.stack(
        [torch.block_diag(*matrices) for matrices in _key_rotations(heads.key_freedom, means, generator)]
    )
    reads = torch.tensor(heads.groups.group_of_head)
    return replace(heads, q=on_k[reads] @ heads.q, k=on_k @ heads.k, v=on_v @ heads.v, o=on_v @ heads.o)


def flat_rotation(dim: int, generator: Generator) -> Float[Tensor, "dim dim"]:
    """Return an orthogonal matrix that spreads every direction of the axes over all dims.

    It is a Hadamard matrix for the powers of two in `dim`, times a Hartley transform for what is left of it. Its rows and columns have
    random signs: an engine that rotates its cache by a Hadamard matrix itself would undo one without.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(matrix)) == 0:
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]]).to(matrix)) / math.sqrt(2)
    rest = torch.arange(dim // len(matrix), dtype=torch.float64)
    turns = 2 * torch.pi * torch.outer(rest, rest) / len(rest)
    signs = torch.randint(0, 2, (2, dim), generator=generator).to(matrix) * 2 - 1
    return signs[0, :, None] * torch.kron(matrix, (turns.cos() + turns.sin()) / len(rest) ** 0.5) * signs[1]


def _key_rotations(
    freedom: KeyFreedom, means: Float[Tensor, "group slot dim"], generator: Generator
) -> Float[Tensor, "group slot dim dim"]:
    """Return a rotation for each slot of each K head, of which `means` has the mean key."""
    rotary, dim = freedom.rotary_dim, means.shape[2]
    rotation = torch.eye(dim, dtype=means.dtype).repeat(*means.shape[:2], 1, 1)
    if freedom.normed:
        return rotation
    if rotary < dim:
        rotation[..., rotary:, rotary:] = flat_rotation(dim - rotary, generator)
    if rotary:
        first, other = freedom.planes().T
        angle = torch.pi / 4 - torch.atan2(means[..., other], means[..., first])
        rotation[..., first, first] = rotation[..., other, other] = angle.cos()
        rotation[..., other, first], rotation[..., first, other] = angle.sin(), -angle.sin()
    return rotation
