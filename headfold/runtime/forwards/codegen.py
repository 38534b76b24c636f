"""CodeGen: GPT-J's rotary position and eager attention, with Q and K in float32; q, k and v are linears that replace one."""

from typing import Any

from torch import Tensor

from ..positions import turn_pairs
from ..projections import attend, keys_and_values, project


def codegen_forward(
    self: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`CodeGenAttention.forward` over grouped heads: return the output (batch, token, model), and the weights."""
    assert position_ids is not None
    table = self.embed_positions.to(hidden_states.device)[position_ids]
    sin, cos = table.repeat_interleave(2, -1).chunk(2, -1)

    def turn(heads: Tensor) -> Tensor:
        return turn_pairs(heads, cos=cos, sin=sin).to(heads.dtype)

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
        eager=_codegen_eager,
        **keywords,
    )
    return self.resid_dropout(self.out_proj(context)), weights


def _codegen_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    output, weights = module._attn(query, key, value, mask)
    return output.transpose(1, 2), weights
