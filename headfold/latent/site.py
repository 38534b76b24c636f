"""One attention site with multi-head latent attention: its projections per head, and the same function as ordinary heads."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Latent:
    """The weights of one MLA site (docs/mla.md). Query head h scores a key by q_nope · (up_k z) + q_rotary · R k, where z = down x is
    the latent, k = rotary x the rotary key that all heads share, and R turns by the distance; its values are up_v z.

    The first dims of a query carry no position, the others belong to the frequency planes (2f, 2f + 1) of the rotary key.
    """

    q: Float[Tensor, "head query model"]
    down: Float[Tensor, "rank model"]
    rotary: Float[Tensor, "rotary model"]
    up_k: Float[Tensor, "head nope rank"]
    up_v: Float[Tensor, "head value_dim rank"]
    o: Float[Tensor, "head value_dim model"]

    @property
    def rank(self) -> int:
        """The dims of the latent."""
        return self.down.shape[0]

    @property
    def rotary_dim(self) -> int:
        """The dims of the rotary key."""
        return self.rotary.shape[0]

    def to(self, dtype: torch.dtype | torch.device) -> "Latent":
        """Return the weights in another dtype or on another device."""
        return Latent(**{name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Latent":
        """Return the site that `tensors` listed."""
        return cls(**tensors)
