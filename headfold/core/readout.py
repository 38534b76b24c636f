"""Shared keys under RoPE beyond one functional per plane: read-outs fitted over the distances that attention covers.

A read-out T that mixes planes does not commute with the rotation R of the distance between query and key, so its error depends
on that distance. With queries, keys and distance taken as independent, keys k = S_i x of member i, shared key B x and E over
distances, the error is

    Σ_i E |qᵀ (R S_i − T_i R B) x|² = Σ_i tr Φ(C_i) G_ii − 2 tr Φ(T_iᵀ C_i) G_i Bᵀ + tr Φ(T_iᵀ C_i T_i) B G Bᵀ

where C_i are the second moments of the queries, G those of all members' keys and Φ(X) = E[Rᵀ X R]. Φ multiplies the 2 × 2 block
between two planes by two numbers: its complex-linear part by the mean rotation at the difference of their frequencies, its
antilinear part by that at their sum. Given T, the best B is (Σ Φ(T_iᵀ C_i T_i))⁻¹ [Φ(T_iᵀ C_i)]_i; given B, the best T_i is
Ψ(G_i Bᵀ) Ψ(B G Bᵀ)⁻¹ with Ψ(X) = E[R X Rᵀ]. Each is a small linear system, and the error never increases. Planes that rotate fast
over all distances stay separate; slow ones become as free as dims without position (docs/absorb.md, 4).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from .distances import Distances
from .heads import KeyFreedom

MAX_ROUNDS = 100
ENOUGH = 1e-4
"""Relative gain below which no further round is made."""
NEGLIGIBLE = 1e-9
"""Error, as a share of the energy, at which the fit stops."""
_RIDGE = 1e-12
"""Added to the diagonal, relative to its largest entry."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The dims of keys as pairs that rotate together; dims without position are pairs of frequency zero."""

    order: Int[Tensor, " dim"]
    """The first dims of all pairs, then their second dims."""
    frequencies: Float[Tensor, " pair"]
    """Radians per token of the pairs of one slot; all slots have the same."""
    slots: int = 1

    @classmethod
    def of(cls, freedom: KeyFreedom, head_dim: int, slots: int = 1) -> "Frame | None":
        """Return the frame of a head with so many slots of `head_dim` dims; None if frequencies are unknown or a dim has no
        partner."""
        rest = torch.arange(freedom.rotary_dim, head_dim)
        if len(freedom.frequencies) * 2 != freedom.rotary_dim or len(rest) % 2:
            return None
        first, second = freedom.planes().T
        halves = [torch.cat([first, rest[: len(rest) // 2]]), torch.cat([second, rest[len(rest) // 2 :]])]
        frequencies = torch.tensor(freedom.frequencies, dtype=torch.float64)
        frequencies = torch.cat([frequencies, frequencies.new_zeros(len(rest) // 2)])
        at = head_dim * torch.arange(slots)[:, None]
        return cls(torch.cat([(at + half).flatten() for half in halves]), frequencies, slots)


class DistanceAverage:
    """The map X ↦ E[R_aᵀ X R_b] over the distances of each member. X is (member, 2 · pair of a, 2 · pair of b) in the order of
    the frames."""

    def __init__(self, a: Frame, b: Frame, distances: Distances) -> None:
        left, right = a.frequencies[:, None], b.frequencies[None]
        self._linear, self._antilinear = (
            distances.average(frequency).repeat(1, a.slots, b.slots) for frequency in (right - left, -left - right)
        )

    def __call__(self, x: Float[Tensor, "#member a b"]) -> Float[Tensor, "member a b"]:
        return self._applied(x, self._linear, self._antilinear)

    def adjoint(self, x: Float[Tensor, "#member a b"]) -> Float[Tensor, "member a b"]:
        """Return E[R_a X R_bᵀ]."""
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
class FittedReadout:
    """A shared key and its read-outs, in the order of the source's dims (and slots)."""

    mix: Float[Tensor, "shared member_times_dim"]
    """B: the shared key as a map of all members' keys."""
    readout: Float[Tensor, "member dim shared"]
    """T_i, which maps the shared key to member i's."""
    error: float
    """Error as a share of the energy after the fit; `before` is that before it."""
    before: float


def fit(
    second: Float[Tensor, "member dim member dim"],
    scatter: Float[Tensor, "member dim member dim"],
    queries: Float[Tensor, "member dim dim"],
    mix: Float[Tensor, "shared member_times_dim"],
    readout: Float[Tensor, "member dim shared"],
    freedom: KeyFreedom,
    distances: Distances,
    ridge: float = 0.0,
) -> FittedReadout | None:
    """Reduce the error above, in float64, by alternating between the shared key and its read-outs; None if frequencies are
    unknown.

    `second` and `scatter` are the moments of the members' keys, over all tokens and around the mean of each sequence. A part of a
    key that is constant over a sequence shifts all logits of a query by the same amount as far as its planes do not rotate, and
    softmax ignores that; the part that the distances rotate counts. The fit starts from `mix` and `readout`. `ridge`, a share of
    the energy of each dim, keeps dims small that say what others say.
    """
    members, dim = queries.shape[:2]
    own, shared = Frame.of(freedom, dim), Frame.of(freedom, dim, readout.shape[2] // dim)
    if own is None or shared is None:
        return None
    at = (dim * torch.arange(members)[:, None] + own.order).flatten()
    moving = (1 - distances.average(own.frequencies).abs().square()).clamp_min(0).sqrt().repeat(1, 2).flatten()
    full, within = (t.flatten(2).flatten(0, 1)[at][:, at] for t in (second, scatter))
    keys = within + moving[:, None] * (full - within) * moving
    keys = keys.view(members, dim, -1)
    queries = queries[:, own.order][:, :, own.order]
    mix, readout = mix[shared.order][:, at], readout[:, own.order][:, :, shared.order]
    found = _alternate(keys, queries, mix, readout, (own, shared), distances, ridge)
    back, back_shared, back_at = (torch.argsort(order) for order in (own.order, shared.order, at))
    found.mix = found.mix[back_shared][:, back_at]
    found.readout = found.readout[:, back][:, :, back_shared]
    return found


def _alternate(
    keys: Float[Tensor, "member dim all"],
    queries: Float[Tensor, "member dim dim"],
    mix: Float[Tensor, "shared all"],
    readout: Float[Tensor, "member dim shared"],
    frames: tuple[Frame, Frame],
    distances: Distances,
    ridge: float,
) -> FittedReadout:
    """Alternate the two linear solutions until the gain is small; all arguments are in the order of the frames."""
    own, shared = frames
    at_source, at_shared = DistanceAverage(own, own, distances), DistanceAverage(shared, shared, distances)
    across, back = DistanceAverage(shared, own, distances), DistanceAverage(own, shared, distances)
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

    best_error = before = error(mix, *weights(readout))
    best = mix, readout
    for _ in range(MAX_ROUNDS):
        if best_error < NEGLIGIBLE:
            break
        product = at_shared.adjoint((mix @ gram @ mix.T)[None])
        readout = _solve_regularised(product, back.adjoint(keys @ mix.T).mT, ridge).mT
        linear, square = weights(readout)
        mix = _solve_regularised(square.sum(0), linear.transpose(0, 1).flatten(1), ridge)
        now = error(mix, linear, square)
        if not now < best_error:
            break
        gained, best_error, best = best_error - now, now, (mix, readout)
        if gained < ENOUGH * best_error:
            break
    return FittedReadout(*best, best_error, before)


def _solve_regularised(matrix: Float[Tensor, "*batch n n"], right: Float[Tensor, "*batch n k"], ridge: float) -> Tensor:
    """Solve a symmetric positive system that may be singular in unused dims, with this share more on its diagonal."""
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    least = _RIDGE * diagonal.amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return torch.linalg.solve(matrix + torch.diag_embed(least + ridge * diagonal), right)
