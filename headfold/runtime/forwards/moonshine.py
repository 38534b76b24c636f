"""Moonshine: rotary position in pairs on most dims of a head, except where the decoder reads the encoder."""

from functools import partial
from typing import Any

from torch import Tensor

from ..positions import turn_pairs
from ..projections import attend, keys_and_values, project


def moonshine_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    key_value_states: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`MoonshineAttention.forward`, self or cross, over grouped heads: return the output (batch, token, model), and the weights."""
    crosses = key_value_states is not None
    turn = None
    if not crosses:
        assert position_embeddings is not None
        # Tables of halves, of which the class takes one, and every angle twice.
        cos, sin = (table.chunk(2, -1)[0].repeat_interleave(2, -1) for table in position_embeddings)
        turn = partial(turn_pairs, cos=cos, sin=sin)
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(
        self,
        hidden_states if key_value_states is None else key_value_states,
        batch=batch,
        layer=self.layer_idx,
        cache=past_key_values,
        crosses=crosses,
        turn=turn,
    )
    context, weights = attend(
        self,
        turn(query) if turn else query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout,
        scaling=self.scaling,
        is_causal=self.is_causal and attention_mask is None and hidden_states.shape[1] > 1,
        **keywords,
    )
    return self.o_proj(context), weights
