"""DINOv3: rotary position in halves, of patches alone; the class token and registers before them have none."""

from typing import Any

import torch
from torch import Tensor

from ..positions import turn_halves
from ..projections import attend, keys_and_values, project


def dinov3_vit_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`DINOv3ViTAttention.forward` over grouped heads: return the output (batch, token, model), and the weights.

    Both `position_embeddings` are (patch, head_dim).
    """
    assert position_embeddings is not None
    cos, sin = (table[None] for table in position_embeddings)

    def turn(heads: Tensor) -> Tensor:
        before = heads.shape[2] - cos.shape[1]
        return torch.cat([heads[:, :, :before], turn_halves(heads[:, :, before:], cos=cos, sin=sin)], 2)

    batch = hidden_states.shape[0]
    query = turn(project(self, "q", hidden_states, batch=batch))
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=None, turn=turn)
    context, weights = attend(
        self, query, key, value, attention_mask, dropout=self.dropout, scaling=self.scaling, **keywords
    )
    return self.o_proj(context), weights
