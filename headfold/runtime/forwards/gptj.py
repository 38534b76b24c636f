"""GPT-J: rotary position on the first dims of a head, in pairs; the stock attention is eager, with Q and K in float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..positions import turn_pairs
from ..projections import attend, keys_and_values, project


def gptj_forward(
    self: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`GPTJAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    assert position_ids is not None
    table = self._get_embed_positions(position_ids[:1])[0]
    sin, cos = table[position_ids].to(hidden_states.dtype).repeat_interleave(2, -1).chunk(2, -1)
    turn = partial(turn_pairs, cos=cos, sin=sin)
    return attend_turned(self, hidden_states, turn, layer_past, attention_mask, **keywords)


def attend_turned(
    self: Any,
    hidden_states: Tensor,
    turn: Callable[[Tensor], Tensor],
    layer_past: Any,
    attention_mask: Tensor | None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Do what follows the table of positions, of which `turn` is a function of heads; CodeGen's attention is the same."""
    batch = hidden_states.shape[0]
    query = turn(project(self, "q", hidden_states, batch=batch))
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=self.layer_idx, cache=layer_past, turn=turn)
    context, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attn_dropout.p,
        scaling=1 / self.scale_attn,
        eager=_eager,
        **keywords,
    )
    return self.resid_dropout(self.out_proj(context)), weights


def _eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    output, weights = module._attn(query, key, value, mask)
    return output.transpose(1, 2), weights
