"""Random equivalents of heads: other weights of the same attention. The laws use them to hide a known answer from the methods."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from .groups import Groups
from .heads import Heads, KeyFreedom

AMPLITUDE = 2.0
"""No transformation scales a direction by more than this or less than its inverse, so condition numbers stay below its square."""


def random_equivalent(heads: Heads, seed: int) -> Heads:
    """Return other weights of the same function, float64: K and V of every head transformed, and all heads shuffled.

    Every K head takes a random transformation that `heads.key_freedom` allows, and its query heads the inverse. Every V head
    takes an invertible matrix, and its output heads the inverse. K/V heads are shuffled with their query heads, and query heads
    within their group, so the result is in standard order. Where the order of heads is fixed nothing is shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = heads.to(torch.float64)
    transforms = [key_transform(heads.key_freedom, heads.head_dim, generator) for _ in range(heads.num_kv_heads)]
    on_k, on_q = (torch.stack(matrices) for matrices in zip(*transforms, strict=True))
    on_v = torch.stack([_invertible(heads.v.shape[1], generator) for _ in range(heads.num_kv_heads)])
    reads = torch.tensor(heads.groups.group_of_head)
    transformed = replace(
        heads, q=on_q[reads] @ heads.q, k=on_k @ heads.k, v=on_v @ heads.v, o=torch.linalg.inv(on_v).mT[reads] @ heads.o
    )
    return transformed if heads.query_order == "fixed" else _shuffle(transformed, generator)


def repeated_random_equivalent(heads: Heads, num_copies: int, seed: int) -> Heads:
    """Return the heads with every K/V head written `num_copies` times, each copy transformed differently, all shuffled.

    If `num_copies` is the number of query heads per K/V head, the result is MHA. Folding it back to `heads.num_kv_heads` can lose
    nothing.
    """
    return random_equivalent(heads.expand(heads.num_kv_heads * num_copies), seed)


def key_transform(
    freedom: KeyFreedom, dim: int, generator: Generator
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim dim"]]:
    """Return a random allowed transformation of K, and the one on Q that undoes it (docs/absorb.md, 1)."""
    if freedom.normed:
        signs = torch.diag(_signs(freedom, dim, generator))
        return signs * (1.0 if freedom.norm_spans_heads else _amplitudes(1, generator)), signs
    on_k = torch.zeros(dim, dim, dtype=torch.float64)
    if freedom.rotary_dim < dim:
        on_k[freedom.rotary_dim :, freedom.rotary_dim :] = _invertible(dim - freedom.rotary_dim, generator)
    if freedom.rotary_dim:
        real, imaginary = freedom.planes().T
        size = _amplitudes(len(real), generator)
        angle = 2 * torch.pi * torch.rand(len(real), dtype=torch.float64, generator=generator)
        on_k[real, real] = on_k[imaginary, imaginary] = size * angle.cos()
        on_k[imaginary, real], on_k[real, imaginary] = size * angle.sin(), -size * angle.sin()
    return on_k, torch.linalg.inv(on_k).mT


def _signs(freedom: KeyFreedom, dim: int, generator: Generator) -> Float[Tensor, " dim"]:
    """Return one random sign per frequency plane, and one per dim that does not rotate."""
    signs = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
    if freedom.rotary_dim:
        first, second = freedom.planes().T
        signs[second] = signs[first]
    return signs


def _amplitudes(num: int, generator: Generator) -> Float[Tensor, " num"]:
    """Return numbers that are log-uniform in [1 / AMPLITUDE, AMPLITUDE]."""
    return AMPLITUDE ** (2 * torch.rand(num, dtype=torch.float64, generator=generator) - 1)


def _invertible(dim: int, generator: Generator) -> Float[Tensor, "dim dim"]:
    """Return a matrix with random singular vectors and singular values within the bounds of AMPLITUDE."""
    left, right = (
        torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0] for _ in range(2)
    )
    return left * _amplitudes(dim, generator) @ right


def _shuffle(heads: Heads, generator: Generator) -> Heads:
    """Put K/V heads in random order with their query heads, and query heads in random order inside each group."""
    new_kv = torch.randperm(heads.num_kv_heads, generator=generator)
    place = new_kv.argsort().tolist()
    moved = replace(
        heads,
        k=heads.k[new_kv],
        v=heads.v[new_kv],
        k_gain=heads.k_gain if heads.k_gain is None or heads.k_gain.ndim == 1 else heads.k_gain[new_kv],
        groups=Groups(tuple(place[group] for group in heads.groups.group_of_head)),
    )
    return moved.reorder(tuple(torch.randperm(heads.num_heads, generator=generator).tolist())).standard()
