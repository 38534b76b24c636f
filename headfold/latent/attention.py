"""Attention with a latent, computed plainly: what the weights of a site mean, without the norm and the layout of the target class."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .rotation import rotated
from .site import Latent


class LatentAttention(nn.Module):
    """An attention module that takes the place of a stock one in a decoder; every sequence begins at position zero."""

    def __init__(self, site: Latent, turns: Float[Tensor, " plane"]) -> None:
        super().__init__()
        self.turns = turns
        for name, tensor in site.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def site(self) -> Latent:
        """The weights, where the module has them."""
        return Latent.of({name: self.get_buffer(name) for name in Latent.__slots__})

    def forward(self, hidden_states: Float[Tensor, "batch token model"], **_: Any) -> tuple[Tensor, None]:
        """Return the output for packed text, causal and without padding."""
        site = self.site
        return torch.einsum("bhtv,hvm->btm", attended_values(site, self.turns, hidden_states), site.o), None


def attended_values(
    site: Latent, turns: Float[Tensor, " plane"], inputs: Float[Tensor, "batch token model"]
) -> Float[Tensor, "batch head token value_dim"]:
    """Return what every head reads for packed text, causal and without padding: the input of the output projection."""
    queries, keys = queries_and_keys(site, turns, inputs)
    values = torch.einsum("bsr,hvr->bhsv", inputs @ site.down.T, site.up_v)
    scaling = queries.shape[-1] ** -0.5
    return nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling)


def queries_and_keys(
    site: Latent, turns: Float[Tensor, " plane"], inputs: Float[Tensor, "batch token model"]
) -> tuple[Float[Tensor, "batch head token dim"], Float[Tensor, "batch head token dim"]]:
    """Return the queries and keys of every head, those that rotate last."""
    nope = site.up_k.shape[1]
    queries = torch.einsum("btm,hdm->bhtd", inputs, site.q)
    keys = torch.einsum("bsr,hdr->bhsd", inputs @ site.down.T, site.up_k)
    shared = rotated(inputs @ site.rotary.T, turns)[:, None].expand(-1, keys.shape[1], -1, -1)
    queries = torch.cat([queries[..., :nope], rotated(queries[..., nope:], turns)], -1)
    return queries, torch.cat([keys, shared], -1)
