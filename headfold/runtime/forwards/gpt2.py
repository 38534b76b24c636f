"""GPT-2: q, k and v are linears that replace one Conv1D; the output projection remains a Conv1D."""

from typing import Any

from torch import Tensor

from ..projections import attend, keys_and_values, project


def gpt2_forward(
    self: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`GPT2Attention.forward`, self or cross, over grouped heads: return the output (batch, token, model), and the weights."""
    batch, crosses = hidden_states.shape[0], encoder_hidden_states is not None
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(
        self,
        hidden_states if encoder_hidden_states is None else encoder_hidden_states,
        batch=batch,
        layer=self.layer_idx,
        cache=past_key_values,
        crosses=crosses,
    )
    mask = encoder_attention_mask if crosses else attention_mask
    eager = _gpt2_upcast if self.reorder_and_upcast_attn else None
    context, weights = attend(
        self, query, key, value, mask, dropout=self.attn_dropout.p, scaling=self.scaling, eager=eager, **keywords
    )
    return self.resid_dropout(self.c_proj(context)), weights


def _gpt2_upcast(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Run the stock class's own eager attention in float32."""
    return module._upcast_and_reordered_attn(query, key, value, mask)
