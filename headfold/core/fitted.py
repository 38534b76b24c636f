"""The weights of one folded site that were fitted to the teacher after the merge."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .heads import Heads


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedHeads:
    """Fitted weights of a site's folded heads, query heads in standard order; None where the merge's own weights stay.

    A refit fits `o` and `v` (and `o_bias` where the site has one) and, where it can, `q`. Heads with `q` are complete: they have `k`
    too, and nothing of the merge is left to compute.
    """

    o: Float[Tensor, "head value_dim model"]
    v: Float[Tensor, "group value_dim model_plus_1"] | None = None
    o_bias: Float[Tensor, " model"] | None = None
    q: Float[Tensor, "head dim model_plus_1"] | None = None
    k: Float[Tensor, "group dim model_plus_1"] | None = None
    q_gain: Float[Tensor, "*heads dim"] | None = None
    """Gains of the norms of queries and keys, where complete heads have them; float64, or float32 on disk."""
    k_gain: Float[Tensor, "*groups dim"] | None = None

    def __post_init__(self) -> None:
        assert (self.q is None) == (self.k is None), "queries and keys are fitted together or not at all"
        assert self.q is None or self.v is not None, "complete heads have values"

    @classmethod
    def of(cls, heads: Heads) -> "FittedHeads":
        """Return all weights of folded heads, as complete ones."""
        return cls(**{field.name: getattr(heads, field.name) for field in fields(cls)})

    @property
    def is_complete(self) -> bool:
        """Whether these are all weights of the folded site, so that it need not be merged."""
        return self.q is not None

    def completed(self, merged: Heads) -> "FittedHeads":
        """Return complete heads: these weights, and those of the merged heads for all others."""
        gains = {"q_gain": merged.q_gain, "k_gain": merged.k_gain}
        own: dict[str, Any] = {"q": merged.q, "k": merged.k, "v": merged.v} | gains | self.to_tensors()
        return replace(self, **own)

    def onto(self, heads: Heads) -> Heads:
        """Return the folded heads with the fitted weights in place of their own."""
        return Heads(**{field.name: getattr(heads, field.name) for field in fields(heads)} | self.to_tensors())

    def to(self, device: str, dtype: torch.dtype) -> "FittedHeads":
        """Return the weights on a device and in a dtype."""
        return replace(self, **{name: tensor.to(device, dtype) for name, tensor in self.to_tensors().items()})

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the fitted weights by field."""
        names = ("q", "k", "v", "o", "o_bias", "q_gain", "k_gain")
        named = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FittedHeads":
        """Return the fitted weights that `to_tensors` listed."""
        return cls(**tensors)
