"""Shared keys under RoPE beyond one functional per plane: read-outs fitted over the distances that attention covers.

A read-out T that mixes planes does not commute with the rotation R of the distance between query and key, so what it costs
depends on that distance. With queries, keys and distance taken as independent, keys k = S_i x of member i, shared key B x and E
over distances,

    Σ_i E |qᵀ (R S_i − T_i R B) x|² = Σ_i tr Φ(C_i) G_ii − 2 tr Φ(T_iᵀ C_i) G_i Bᵀ + tr Φ(T_iᵀ C_i T_i) B G Bᵀ

where C_i are the second moments of the queries, G those of all members' keys and Φ(X) = E[Rᵀ X R]. Φ acts on the 2 × 2 block
between two planes by two numbers: on its complex-linear part by the mean rotation at the difference of their frequencies, on its
antilinear part at their sum. So given T the best B is (Σ Φ(T_iᵀ C_i T_i))⁻¹ [Φ(T_iᵀ C_i)]_i, and given B the best T_i is
Ψ(G_i Bᵀ) Ψ(B G Bᵀ)⁻¹ with Ψ(X) = E[R X Rᵀ]: each a small linear system, and the error never rises. Planes that turn fast over
all distances stay apart, slow ones become as free as dims without position (docs/absorb.md, 4).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from .distances import Distances
from .heads import KeyFreedom

MAX_ROUNDS = 100
ENOUGH = 1e-4
"""Relative gain of a round below which no further one is made."""
NEGLIGIBLE = 1e-9
"""Error as a share of the energy from which there is nothing left to gain."""
_RIDGE = 1e-12


@dataclass(frozen=True, slots=True)
class Frame:
    """The dims of keys of one width as pairs that turn together; dims without position are pairs of frequency zero."""

    order: Int[Tensor, " dim"]
    """First dims of all pairs, then their second ones."""
    frequencies: Float[Tensor, " pair"]
    """Of one slot; every slot has them."""
    slots: int = 1

    @classmethod
    def of(cls, freedom: KeyFreedom, head_dim: int, slots: int = 1) -> "Frame | None":
        """None where frequencies are not known, or a dim has no partner."""
        rest = torch.arange(freedom.rotary_dim, head_dim)
        if len(freedom.frequencies) * 2 != freedom.rotary_dim or len(rest) % 2:
            return None
        first, second = freedom.planes().T
        halves = [torch.cat([first, rest[: len(rest) // 2]]), torch.cat([second, rest[len(rest) // 2 :]])]
        turning = torch.tensor(freedom.frequencies, dtype=torch.float64)
        turning = torch.cat([turning, turning.new_zeros(len(rest) // 2)])
        at = head_dim * torch.arange(slots)[:, None]
        return cls(torch.cat([(at + half).flatten() for half in halves]), turning, slots)


class Average:
    """X ↦ E[R_aᵀ X R_b], for every member its own distances. X is (member, 2 · pair of a, 2 · pair of b) in the order of frames."""

    def __init__(self, a: Frame, b: Frame, distances: Distances) -> None:
        left, right = a.frequencies[:, None], b.frequencies[None]
        self._linear, self._antilinear = (
            distances.average(turn).repeat(1, a.slots, b.slots) for turn in (right - left, -left - right)
        )

    def __call__(self, x: Float[Tensor, "#member a b"]) -> Float[Tensor, "member a b"]:
        return self._applied(x, self._linear, self._antilinear)

    def adjoint(self, x: Float[Tensor, "#member a b"]) -> Float[Tensor, "member a b"]:
        """E[R_a X R_bᵀ]."""
        return self._applied(x, self._linear.conj(), self._antilinear.conj())

    @staticmethod
    def _applied(x: Tensor, linear: Complex[Tensor, "..."], antilinear: Complex[Tensor, "..."]) -> Tensor:
        (p, q), (r, s) = (half.chunk(2, -1) for half in x.chunk(2, -2))
        u = torch.complex(p + s, r - q) * linear / 2
        w = torch.complex(p - s, r + q) * antilinear / 2
        upper = torch.cat([u.real + w.real, w.imag - u.imag], -1)
        lower = torch.cat([u.imag + w.imag, u.real - w.real], -1)
        return torch.cat([upper, lower], -2)


@dataclass(slots=True)
class Fitted:
    """A shared key and its readers, in the order of the source's dims (and slots)."""

    mix: Float[Tensor, "shared member_times_dim"]
    """B: the shared key of all members' keys."""
    readout: Float[Tensor, "member dim shared"]
    """T_i."""
    error: float
    """As a share of the energy; `before` what it was."""
    before: float


def fit(
    second: Float[Tensor, "member dim member dim"],
    scatter: Float[Tensor, "member dim member dim"],
    queries: Float[Tensor, "member dim dim"],
    mix: Float[Tensor, "shared member_times_dim"],
    readout: Float[Tensor, "member dim shared"],
    freedom: KeyFreedom,
    distances: Distances,
) -> Fitted | None:
    """Improve a shared key on the error above. float64.

    `second` and `scatter` are the moments of the members' keys, over all and about the mean of each sequence: a part of a key
    that is constant over a sequence shifts all logits of a query alike as far as its planes stand still, and softmax ignores
    that; what the distances turn of it counts. `mix` and `readout` are where to start. None where the frequencies are not known.
    """
    members, dim = queries.shape[:2]
    own, shared = Frame.of(freedom, dim), Frame.of(freedom, dim, readout.shape[2] // dim)
    if own is None or shared is None:
        return None
    at = (dim * torch.arange(members)[:, None] + own.order).flatten()
    turned = (1 - distances.average(own.frequencies).abs().square()).clamp_min(0).sqrt().repeat(1, 2).flatten()
    full, within = (t.flatten(2).flatten(0, 1)[at][:, at] for t in (second, scatter))
    keys = within + turned[:, None] * (full - within) * turned
    keys = keys.view(members, dim, -1)
    queries = queries[:, own.order][:, :, own.order]
    mix, readout = mix[shared.order][:, at], readout[:, own.order][:, :, shared.order]
    found = _alternated(keys, queries, mix, readout, (own, shared), distances)
    back, back_shared, back_at = (torch.argsort(order) for order in (own.order, shared.order, at))
    found.mix = found.mix[back_shared][:, back_at]
    found.readout = found.readout[:, back][:, :, back_shared]
    return found


def _alternated(
    keys: Float[Tensor, "member dim all"],
    queries: Float[Tensor, "member dim dim"],
    mix: Float[Tensor, "shared all"],
    readout: Float[Tensor, "member dim shared"],
    frames: tuple[Frame, Frame],
    distances: Distances,
) -> Fitted:
    own, shared = frames
    at_source, at_shared = Average(own, own, distances), Average(shared, shared, distances)
    across, back = Average(shared, own, distances), Average(own, shared, distances)
    gram = keys.flatten(0, 1)
    dim = queries.shape[1]
    diagonal = torch.stack([keys[i, :, i * dim : (i + 1) * dim] for i in range(len(keys))])
    energy = float((at_source(queries) * diagonal.mT).sum())

    def weights(readout: Tensor) -> tuple[Tensor, Tensor]:
        read = readout.mT @ queries
        return across(read), at_shared(read @ readout)

    def error(mix: Tensor, linear: Tensor, square: Tensor) -> float:
        seen = keys @ mix.T
        return 1 + float((square.sum(0) * (mix @ gram @ mix.T)).sum() - 2 * (linear * seen.mT).sum()) / max(
            energy, 1e-300
        )

    lost = before = error(mix, *weights(readout))
    best = mix, readout
    for _ in range(MAX_ROUNDS):
        if lost < NEGLIGIBLE:
            break
        product = at_shared.adjoint((mix @ gram @ mix.T)[None])
        readout = _solved(product, back.adjoint(keys @ mix.T).mT).mT
        linear, square = weights(readout)
        mix = _solved(square.sum(0), linear.transpose(0, 1).flatten(1))
        now = error(mix, linear, square)
        if not now < lost:
            break
        gained, lost, best = lost - now, now, (mix, readout)
        if gained < ENOUGH * lost:
            break
    return Fitted(*best, lost, before)


def _solved(matrix: Float[Tensor, "*batch n n"], right: Float[Tensor, "*batch n k"]) -> Tensor:
    """Of a symmetric positive matrix, which dims that nobody reads may leave singular."""
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    ridge = _RIDGE * diagonal.amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return torch.linalg.solve(matrix + torch.diag_embed(ridge.expand_as(diagonal)), right)
