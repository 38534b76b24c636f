"""ModernBERT: rotary position in halves, computed in float32; windows in some layers; q, k and v are linears that replace one."""

from typing import Any

from torch import Tensor

from ..positions import turn_halves
from ..projections import attend, keys_and_values, project


def modernbert_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`ModernBertAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    assert position_embeddings is not None
    cos, sin = position_embeddings

    def turn(heads: Tensor) -> Tensor:
        return turn_halves(heads.float(), cos=cos, sin=sin).to(heads.dtype)

    batch = hidden_states.shape[0]
    query = turn(project(self, "q", hidden_states, batch=batch))
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=None, turn=turn)
    context, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout,
        scaling=self.head_dim**-0.5,
        sliding_window=self.sliding_window,
        deterministic=self.deterministic_flash_attn,
        **keywords,
    )
    return self.out_drop(self.Wo(context)), weights
