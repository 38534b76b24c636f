"""BLOOM: an ALiBi bias per head; the residual is added inside the attention."""

from typing import Any

from torch import Tensor, nn

from ..projections import attend, keys_and_values, project


def bloom_forward(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`BloomAttention.forward` over grouped heads: return the output (batch, token, model), and the weights.

    `alibi` is (batch · head, 1, key).
    """
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_idx, cache=layer_past)
    context, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout.p,
        scaling=self.inv_norm_factor,
        position_bias=alibi.view(batch, -1, 1, alibi.shape[-1]),
        **keywords,
    )
    return residual + nn.functional.dropout(self.dense(context), self.hidden_dropout, self.training), weights
