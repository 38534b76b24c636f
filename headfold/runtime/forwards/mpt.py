"""MPT: an ALiBi bias per head, and a mask that is true where tokens must not attend."""

from typing import Any

from torch import Tensor

from ..projections import attend, keys_and_values, project


def mpt_forward(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`MptAttention.forward` over grouped heads: return the output (batch, token, model), and the weights.

    `position_bias` is (head, 1, longest context).
    """
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_idx, cache=past_key_values)
    if self.clip_qkv:
        query, key, value = (states.clamp(-self.clip_qkv, self.clip_qkv) for states in (query, key, value))
    bias = None if position_bias is None else position_bias[None, ..., -key.shape[2] :]
    mask = None if attention_mask is None else ~attention_mask
    context, weights = attend(
        self,
        query,
        key,
        value,
        mask,
        dropout=self.attn_dropout_p,
        scaling=self.softmax_scale,
        position_bias=bias,
        **keywords,
    )
    return self.out_proj(context), weights
