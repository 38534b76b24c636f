"""GPT-NeoX: rotary position on the first dims of a head, in halves."""

from functools import partial
from typing import Any

from torch import Tensor

from ..positions import turn_halves
from ..projections import attend, keys_and_values, project


def gpt_neox_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`GPTNeoXAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    assert position_embeddings is not None
    cos, sin = position_embeddings
    turn = partial(turn_halves, cos=cos, sin=sin)
    batch = hidden_states.shape[0]
    query = turn(project(self, "q", hidden_states, batch=batch))
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_idx, cache=layer_past, turn=turn)
    context, weights = attend(
        self, query, key, value, attention_mask, dropout=self.attention_dropout, scaling=self.scaling, **keywords
    )
    return self.dense(context), weights
