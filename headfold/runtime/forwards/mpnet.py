"""MPNet: a relative position bias that the encoder computes once for all its layers; the stock attention is eager."""

from typing import Any

from torch import Tensor

from ..projections import attend, keys_and_values, project


def mpnet_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor | None, ...]:
    """`MPNetSelfAttention.forward` over grouped heads: return the output (batch, token, model), and the weights if asked for.

    `position_bias` is (batch, head, token, token).
    """
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=None)
    context, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.dropout.p,
        scaling=self.attention_head_size**-0.5,
        position_bias=position_bias,
        is_causal=False,
    )
    output = self.o(context)
    return (output, weights) if output_attentions else (output,)
