"""Queries of recorded calls as functions of W_q, with the keys that they may attend to.

Without norms a query is linear in W_q: a complex factor per frequency plane times W_q x. Under a norm of each head it is linear but for the
division by its root mean square; a step is then taken along the tangent, x ↦ (δ − û mean(û δ)) / r for W_q x of root mean square r and
û = W_q x / r, and its length is searched for with the norm as it is. A norm of all heads is held at what it was: one head changes it
little.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from ..core.heads import KeyFreedom
from ..descent.kronecker import Rows

Queries = Float[Tensor, "batch head query dim"]
Logits = Float[Tensor, "batch head query key"]


@dataclass(frozen=True, slots=True)
class Normed:
    """W_q x of some queries, divided by its root mean square, and that."""

    unit: Queries
    length: Float[Tensor, "batch #head query 1"]

    @classmethod
    def of(cls, z: Queries, length: Tensor | None = None) -> "Normed":
        """Return W_q x = `z` divided by its root mean square, or by `length` where one norm spans all heads."""
        if length is None:
            length = z.square().mean(3, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny).sqrt()
        return cls(z / length, length)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Some queries of one recorded call, with all keys that they may attend to."""

    inputs: Float[Tensor, "batch query size"]
    turn: Complex[Tensor, "batch query plane"] | None
    """What position does to each frequency plane of the query, as the module did it."""
    factor: Float[Tensor, ""]
    """What the module multiplied the dims without position by (Whisper: by what others multiply logits by)."""
    normed: "Normed | None"
    """What the module's norm made of W_q x at the folded heads; None without norms."""
    query: Queries
    key: Float[Tensor, "batch group key dim"]
    target_query: Float[Tensor, "batch head query target_dim"]
    target_key: Float[Tensor, "batch target_group key target_dim"]
    hidden: Tensor | None
    """What to add to the logits; broadcasts to (batch, head, query, key)."""
    target_hidden: Tensor | None
    """The same for the original's heads in their own order."""
    counted: Bool[Tensor, "batch query"] | None
    scaling: float
    quantile: Float[Tensor, " query"]
    """Where a key is drawn from a query's attention; over all queries they cover [0, 1] evenly."""


@dataclass(frozen=True, slots=True)
class QueryMap:
    """The queries of a site as functions of W_q, and the original's attention for them."""

    freedom: KeyFreedom
    gain: Float[Tensor, "*#head 1 dim"] | None
    """That of the norm of queries."""
    order: Int[Tensor, " head"] | None
    """New position → query head of the original; None where no head moves, which saves a copy of its weights."""

    def turned(self, z: Queries, at: Sampled, *, back: bool = False) -> Queries:
        """Apply the position of the queries, or its adjoint."""
        if at.turn is None:
            return z * at.factor
        planes = self.freedom.planes().to(z.device)
        turn = (at.turn.conj() if back else at.turn)[:, None]
        moved = torch.complex(z[..., planes[:, 0]], z[..., planes[:, 1]]) * turn
        z = z * at.factor
        z[..., planes[:, 0]], z[..., planes[:, 1]] = moved.real, moved.imag
        return z

    def queries(self, z: Queries, at: Sampled) -> Queries:
        """Return the queries of W_q x = `z`."""
        if at.normed is not None:
            together = self.freedom.norm_spans_heads
            z = self.gained(Normed.of(z, at.normed.length if together else None).unit)
        return self.turned(z, at)

    def moved(self, step: Rows, at: Sampled) -> Queries:
        """Return how queries move, to first order, if W_q moves by `step`."""
        return self.turned(self.gained(self._along(projected(step, at), at)), at)

    def pulled(self, gradient: Queries, at: Sampled) -> Queries:
        """Return the gradient in W_q x for one in the queries, zero where a query does not count."""
        gradient = at.scaling * self._along(self.gained(self.turned(gradient, at, back=True)), at)
        return gradient if at.counted is None else gradient * at.counted[:, None, :, None]

    def gained(self, z: Queries) -> Queries:
        """Return what the gain of the norm makes of queries; its adjoint is the same."""
        return z if self.gain is None else z * self.gain.to(z)

    def _along(self, z: Queries, at: Sampled) -> Queries:
        """Apply the tangent of the norm, which is its own adjoint."""
        if at.normed is None:
            return z
        if not self.freedom.norm_spans_heads:
            z = z - at.normed.unit * (at.normed.unit * z).mean(3, keepdim=True)
        return z / at.normed.length

    def target(self, at: Sampled) -> Logits:
        """Return the original's attention."""
        weights = logits(at.target_query, at.target_key, at.scaling, at.target_hidden).softmax(-1)
        return weights if self.order is None else weights.index_select(1, self.order)


def logits(query: Queries, key: Tensor, scaling: float, hidden: Tensor | None = None) -> Logits:
    """Return scaled and masked logits in float32 or better."""
    precise = torch.promote_types(query.dtype, torch.float32)
    grouped = (scaling * query.to(precise)).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    found = (grouped @ key.to(precise).mT).view(*query.shape[:3], -1)
    return found if hidden is None else found.add_(hidden)


def weighted(weights: Logits, key: Tensor) -> Queries:
    """Return Σ_s weights_ts k_s for every query."""
    grouped = weights.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return (grouped @ key.to(weights.dtype)).view(*weights.shape[:3], -1)


def projected(rows: Rows, at: Sampled) -> Queries:
    """Return W x for these rows W."""
    return torch.einsum("bts,hds->bhtd", at.inputs.to(rows.dtype), rows)
