"""Whisper: encoder, decoder and cross-attention are one class; K has no bias; queries are scaled after their projection."""

from typing import Any

from torch import Tensor

from ..projections import attend, keys_and_values, project


def whisper_forward(
    self: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`WhisperAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    batch, crosses = hidden_states.shape[0], key_value_states is not None
    query = project(self, "q", hidden_states, batch=batch) * self.scaling
    key, value = keys_and_values(
        self,
        hidden_states if key_value_states is None else key_value_states,
        batch=batch,
        layer=self.layer_idx,
        cache=past_key_values,
        crosses=crosses,
    )
    context, weights = attend(self, query, key, value, attention_mask, dropout=self.dropout, scaling=1.0, **keywords)
    return self.out_proj(context), weights
