"""UMT5: T5's relative position bias, separate in every layer; no softmax scale; self- and cross-attention are one class."""

from typing import Any

import torch
from torch import Tensor

from ..projections import attend, keys_and_values, project


def umt5_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`UMT5Attention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    batch, crosses = hidden_states.shape[0], encoder_hidden_states is not None
    past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
    # A static cache counts in place, in the very tensor that it hands out.
    past = past.clone() if isinstance(past, torch.Tensor) else past
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(
        self,
        hidden_states if encoder_hidden_states is None else encoder_hidden_states,
        batch=batch,
        layer=self.layer_idx,
        cache=past_key_values,
        crosses=crosses,
    )
    bias = None
    if self.has_relative_attention_bias:
        bias = self.compute_bias(query.shape[2], key.shape[2], device=query.device, past_seen_tokens=past)
    context, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.dropout,
        scaling=self.scaling,
        position_bias=bias,
        **keywords,
    )
    return self.o(context), weights
