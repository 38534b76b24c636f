"""GPT-Neo: no softmax scale, Q and K in float32, and in every other layer a sliding window that the module masks itself."""

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import plain_attention
from ..projections import attend, keys_and_values, project


def gpt_neo_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`GPTNeoSelfAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_id, cache=layer_past)
    mask = _gpt_neo_mask(self, attention_mask, query.shape[2], key.shape[2], hidden_states.dtype)
    context, weights = attend(
        self, query, key, value, mask, dropout=self.attn_dropout.p, scaling=1.0, eager=_gpt_neo_eager, **keywords
    )
    return self.resid_dropout(self.out_proj(context)), weights


def _gpt_neo_mask(module: Any, mask: Tensor | None, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Return the window (1, 1, query, key), combined with the mask that arrives, boolean or additive."""
    window = module.bias[:, :, num_keys - num_queries : num_keys, :num_keys]
    if mask is None or mask.dtype == torch.bool:
        return window if mask is None else window & mask
    return torch.where(window, mask, torch.finfo(dtype).min)


def _gpt_neo_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    return plain_attention(module, query.float(), key.float(), value, mask, **keywords)
