"""Falcon, all three layouts: rotary position in halves, or an ALiBi bias that is part of the mask."""

from functools import partial
from typing import Any

from torch import Tensor

from ..attention import plain_attention
from ..positions import turn_halves
from ..projections import attend, keys_and_values, project


def falcon_forward(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`FalconAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    turn = None
    if alibi is None and position_embeddings is not None:
        cos, sin = position_embeddings
        turn = partial(turn_halves, cos=cos, sin=sin)
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_idx, cache=layer_past, turn=turn)
    context, weights = attend(
        self,
        turn(query) if turn else query,
        key,
        value,
        attention_mask,
        # As in the stock class: dropout of the weights with ALiBi alone.
        dropout=0.0 if alibi is None else self.attention_dropout.p,
        scaling=self.inv_norm_factor,
        eager=plain_attention,
        **keywords,
    )
    return self.dense(context), weights
