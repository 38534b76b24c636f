"""Pixtral: rotary position in halves over rows and columns of patches; the patches of all images are one row, under a mask."""

from functools import partial
from typing import Any

from torch import Tensor

from ..positions import turn_halves
from ..projections import attend, keys_and_values, project


def pixtral_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`PixtralAttention.forward` over grouped heads: return the output (batch, patch, model), and the weights."""
    assert position_embeddings is not None
    cos, sin = (table[None] for table in position_embeddings)
    turn, batch = partial(turn_halves, cos=cos, sin=sin), hidden_states.shape[0]
    query = turn(project(self, "q", hidden_states, batch=batch))
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=None, turn=turn)
    context, weights = attend(
        self, query, key, value, attention_mask, dropout=self.dropout, scaling=self.scaling, **keywords
    )
    return self.o_proj(context), weights
