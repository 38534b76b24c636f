"""The heads of one attention site as four tensors, and which of their transformations leave attention unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .groups import Groups

QueryOrder = Literal["free", "stack", "fixed"]
"""Who decides the order of query heads: the site alone, its whole stack (T5's shared bias), or nobody (ALiBi)."""


def kv_bytes(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Return the bytes of K and V that one token adds to the cache of one site; `itemsize` is that of the cache's dtype."""
    return 2 * num_kv_heads * head_dim * itemsize


@dataclass(frozen=True, slots=True)
class KeyFreedom:
    """Which transformations of K, undone on Q, leave every attention logit unchanged (docs/absorb.md, 1).

    The first `rotary_dim` dims of a head are frequency planes of RoPE: one complex number per plane is free, or, under
    q/k-norm (`normed`), one sign per plane and a positive scale for the whole of K. All further dims carry no position:
    any invertible matrix is free. Dims are pre-RoPE; under `normed` they are pre-norm.
    """

    kind: Literal["any", "rope-halves", "rope-pairs", "signs"]
    rotary_dim: int = 0
    interleaved: bool = False
    """Whether the dims (2f, 2f + 1) form plane f; else (f, f + rotary_dim / 2) do."""
    frequencies: tuple[float, ...] = ()
    """Radians per token of every plane; empty where they are not known."""
    context: int = 0
    """Tokens that attention may span, as far as that is known."""

    def planes(self) -> Int[Tensor, "plane 2"]:
        """The two dims of each frequency plane, in order of falling frequency."""
        dims = torch.arange(self.rotary_dim)
        return dims.view(-1, 2) if self.interleaved else dims.view(2, -1).T

    @property
    def normed(self) -> bool:
        """Whether q and k pass a per-head norm after their projection."""
        return self.kind == "signs"


@dataclass(frozen=True, slots=True)
class Heads:
    """The projections of one attention site, per head, in homogeneous coordinates.

    The last column of `q`, `k`, `v` is the bias (zero where the checkpoint has none), so that every linear merge carries
    biases by construction. `dim` of q and k may differ from the source's and from that of v and o: never derive it.
    Query head h reads K/V head `groups.group_of_head[h]`; in a checkpoint that is h // (heads // groups).
    """

    q: Float[Tensor, "head dim model_plus_1"]
    k: Float[Tensor, "group dim model_plus_1"]
    v: Float[Tensor, "group value_dim model_plus_1"]
    o: Float[Tensor, "head value_dim model"]
    groups: Groups
    key_freedom: KeyFreedom
    query_order: QueryOrder = "free"
    o_bias: Float[Tensor, " model"] | None = None
    q_gain: Float[Tensor, " dim"] | None = None
    """Gain of the per-head q-norm, shared by all heads (q/k-norm families)."""
    k_gain: Float[Tensor, " dim"] | None = None
    per_head: Mapping[str, Shaped[Tensor, "head ..."]] = field(default_factory=dict)
    """What else belongs to single query heads and moves with them, such as the columns of T5's position bias."""

    @property
    def num_heads(self) -> int:
        return self.q.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        """Width of one K head."""
        return self.k.shape[1]

    def to(self, dtype: torch.dtype | torch.device) -> "Heads":
        """The same heads computed in another dtype, or on another device; extras stay."""
        names = ("q", "k", "v", "o", "o_bias", "q_gain", "k_gain")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.to(dtype) for name, t in tensors.items() if t is not None})

    def per_query(self) -> "Heads":
        """The head-repeated twin: every query head with a K/V head of its own. Same function, MHA shapes."""
        index = torch.tensor(self.groups.group_of_head)
        own = Groups(tuple(range(self.num_heads)))
        return replace(self, k=self.k[index], v=self.v[index], groups=own)

    def expand(self, num_kv_heads: int) -> "Heads":
        """The same function written with `num_kv_heads` K/V heads for equally many neighbouring queries each: ours, repeated."""
        own = Groups.contiguous(self.num_heads, num_kv_heads)
        shared = torch.tensor([self.groups.group_of_head[queries[0]] for queries in own.members])
        assert own.compose(Groups.of(shared.tolist())) == Groups.of(self.groups.group_of_head)
        return replace(self, k=self.k[shared], v=self.v[shared], groups=own)

    def reorder(self, order: tuple[int, ...]) -> "Heads":
        """Query heads in the given order: q rows and o columns move together, so the site computes the same function."""
        index = torch.tensor(order)
        moved = Groups(tuple(self.groups.group_of_head[h] for h in order))
        extras = {name: tensor[index] for name, tensor in self.per_head.items()}
        return replace(self, q=self.q[index], o=self.o[index], groups=moved, per_head=extras)

    def standard(self) -> "Heads":
        """Query heads sorted by the K/V head they read: the order GQA runtimes assume."""
        return self.reorder(self.groups.standard_order())
