"""OPT: positions are added to the embeddings, and queries are scaled after their projection."""

from typing import Any

from torch import Tensor

from ..projections import attend, keys_and_values, project


def opt_forward(
    self: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`OPTAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch) * self.scaling
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_idx, cache=past_key_values)
    context, weights = attend(self, query, key, value, attention_mask, dropout=self.dropout, scaling=1.0, **keywords)
    return self.out_proj(context), weights
