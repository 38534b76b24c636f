"""The heads of one attention site as four tensors, and which transformations of them leave attention unchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .groups import Groups

QueryOrder = Literal["free", "stack", "fixed"]
"""What fixes the order of query heads: nothing ("free"), a position bias that the whole stack shares (T5: "stack"), or slopes by
head index (ALiBi: "fixed")."""


FreedomKind = Literal["any", "rope-halves", "rope-pairs", "signs"]
"""No position on K; RoPE with planes (f, f + rotary_dim / 2) or (2f, 2f + 1); RoPE after a norm of q and k."""


def kv_bytes(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Return the bytes of K and V that one token adds to the cache of one site; `itemsize` is that of the cache's dtype."""
    return 2 * num_kv_heads * head_dim * itemsize


@dataclass(frozen=True, slots=True)
class KeyFreedom:
    """Which transformations of K, undone on Q, leave every attention logit unchanged (docs/absorb.md, 1).

    The first `rotary_dim` dims of a head are frequency planes of RoPE: one complex number per plane is free, or, under
    q/k-norm (`normed`), one sign per plane and a positive scale for the whole of K. All further dims carry no position:
    any invertible matrix is free. Dims are pre-RoPE; under `normed` they are pre-norm. Where one norm spans all heads
    (`norm_spans_heads`), no scale is free either.
    """

    kind: FreedomKind
    rotary_dim: int = 0
    interleaved: bool = False
    """Whether the dims (2f, 2f + 1) form plane f; else (f, f + rotary_dim / 2) do."""
    frequencies: tuple[float, ...] = ()
    """Radians per token of every plane; empty if unknown."""
    context: int = 0
    """The number of tokens that attention may span; 0 if unknown."""
    norm_spans_heads: bool = False
    """Whether one norm is taken over all q heads and one over all k heads; else every head has its own."""

    def planes(self) -> Int[Tensor, "plane 2"]:
        """Return the two dims of each frequency plane, in order of falling frequency."""
        dims = torch.arange(self.rotary_dim)
        return dims.view(-1, 2) if self.interleaved else dims.view(2, -1).T

    @property
    def normed(self) -> bool:
        """Whether q and k pass a norm after their projection."""
        return self.kind == "signs"

    def without_norm(self) -> "KeyFreedom":
        """Return the freedom of the same keys without their norm."""
        return replace(self, kind="rope-pairs" if self.interleaved else "rope-halves", norm_spans_heads=False)


@dataclass(frozen=True, slots=True)
class Heads:
    """The projections of one attention site, per head, in homogeneous coordinates.

    The last column of `q`, `k`, `v` is the bias (zero where the checkpoint has none), so that every linear merge transforms biases
    too. `dim` of q and k may differ from the source's and from that of v and o; do not derive it from other sizes. q or o may be
    empty (no inputs, no outputs) where the weight is copied on disk (`surgery.read_without_kept`). Query head h reads K/V head
    `groups.group_of_head[h]`; in a checkpoint that is h // (heads // groups).
    """

    q: Float[Tensor, "head dim query_model_plus_1"]
    k: Float[Tensor, "group dim model_plus_1"]
    v: Float[Tensor, "group value_dim model_plus_1"]
    o: Float[Tensor, "head value_dim output"]
    groups: Groups
    key_freedom: KeyFreedom
    query_order: QueryOrder = "free"
    o_bias: Float[Tensor, " model"] | None = None
    q_gain: Float[Tensor, "*heads dim"] | None = None
    """Gain of the q-norm as it is stored, in float64: (dim,), which all heads share, or (head, dim) where one norm spans all heads."""
    k_gain: Float[Tensor, "*groups dim"] | None = None
    gain_offset: float = 0.0
    """What the norms add to their stored gains (Gemma: 1)."""
    per_head: Mapping[str, Shaped[Tensor, "head ..."]] = field(default_factory=dict)
    """Other tensors with one entry per query head, which move with it, such as the columns of T5's position bias."""

    @property
    def num_heads(self) -> int:
        return self.q.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        """The dims of one K head."""
        return self.k.shape[1]

    def to(self, dtype: torch.dtype | torch.device) -> "Heads":
        """Return the heads in another dtype or on another device; `per_head` stays as it is, and gains stay in float64."""
        names = ("q", "k", "v", "o", "o_bias", *(() if isinstance(dtype, torch.dtype) else ("q_gain", "k_gain")))
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.to(dtype) for name, t in tensors.items() if t is not None})

    def gain(self, role: Literal["q", "k"]) -> Tensor | None:
        """Return what the norm of queries or keys multiplies by, in float64."""
        stored = self.q_gain if role == "q" else self.k_gain
        return None if stored is None else stored.double() + self.gain_offset

    def kept(self, members: Sequence[int], groups: Groups) -> "Heads":
        """Return heads with one K/V head of each group, these; q and o are unchanged."""
        members = list(members)
        gain = self.k_gain if self.k_gain is None or self.k_gain.ndim == 1 else self.k_gain[members]
        return replace(self, k=self.k[members], v=self.v[members], k_gain=gain, groups=self.groups.compose(groups))

    def mean_k_gain(self, groups: Groups) -> Tensor | None:
        """Return the gains of shared K heads, where every K head has its own: the mean of a group's."""
        if self.k_gain is None or self.k_gain.ndim == 1:
            return self.k_gain
        return torch.stack([self.k_gain[list(members)].mean(0) for members in groups.members])

    def per_query(self) -> "Heads":
        """Return the head-repeated twin: the same function with one K/V head per query head (MHA)."""
        index = torch.tensor(self.groups.group_of_head)
        own = Groups(tuple(range(self.num_heads)))
        return replace(self, k=self.k[index], v=self.v[index], k_gain=_of_heads(self.k_gain, index), groups=own)

    def expand(self, num_kv_heads: int) -> "Heads":
        """Return the same function with `num_kv_heads` K/V heads, each repeated, and equal runs of query heads."""
        own = Groups.contiguous(self.num_heads, num_kv_heads)
        shared = torch.tensor([self.groups.group_of_head[queries[0]] for queries in own.members])
        assert own.compose(Groups.of(shared.tolist())) == Groups.of(self.groups.group_of_head)
        return replace(self, k=self.k[shared], v=self.v[shared], k_gain=_of_heads(self.k_gain, shared), groups=own)

    def reorder(self, order: tuple[int, ...]) -> "Heads":
        """Return the same function with the query heads in the given order: q rows, o columns and `per_head` move together."""
        index = torch.tensor(order)
        moved = Groups(tuple(self.groups.group_of_head[h] for h in order))
        extras = {name: tensor[index] for name, tensor in self.per_head.items()}
        gain = _of_heads(self.q_gain, index)
        return replace(self, q=self.q[index], o=self.o[index], q_gain=gain, groups=moved, per_head=extras)

    def standard(self) -> "Heads":
        """Return the heads with query heads sorted by the K/V head they read, the order that GQA runtimes assume."""
        return self.reorder(self.groups.standard_order())


def _of_heads(gain: Tensor | None, index: Tensor) -> Tensor | None:
    """Return the gains of these heads, where heads have their own."""
    return gain if gain is None or gain.ndim == 1 else gain[index.to(gain.device)]
