"""XGLM: positions are added to the embeddings, and queries are scaled after their projection; the stock attention is eager."""

from typing import Any

from torch import Tensor

from ..projections import attend, keys_and_values, project


def xglm_forward(
    self: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`XGLMAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    assert key_value_states is None, "a language model alone has no encoder"
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch) * self.scaling
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_idx, cache=past_key_values)
    context, weights = attend(self, query, key, value, attention_mask, dropout=self.dropout, scaling=1.0, **keywords)
    return self.out_proj(context), weights
