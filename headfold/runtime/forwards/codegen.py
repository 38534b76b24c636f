"""CodeGen: GPT-J's rotary position and eager attention, with Q and K in float32; q, k and v are linears that replace one."""

from typing import Any

from torch import Tensor

from ..positions import turn_pairs
from .gptj import attend_turned


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

    return attend_turned(self, hidden_states, turn, layer_past, attention_mask, **keywords)
