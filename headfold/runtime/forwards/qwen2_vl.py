"""Qwen2-VL's tower: rotary position in halves, in float32; the patches of all images are one row, and each image attends to itself."""

from typing import Any

import torch
from torch import Tensor

from ..decoding import plain_attention
from ..positions import turn_halves
from ..projections import attend, keys_and_values, project


def qwen2_vl_forward(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None,
    **keywords: Any,
) -> Tensor:
    """`VisionAttention.forward` over grouped heads: return the output (patch, model). `cu_seqlens` are the ends of the images."""
    assert position_embeddings is not None
    cos, sin = (table[None].float() for table in position_embeddings)

    def turn(heads: Tensor) -> Tensor:
        return turn_halves(heads.float(), cos=cos, sin=sin).to(heads.dtype)

    query = turn(project(self, "q", hidden_states[None], batch=1))
    key, value = keys_and_values(self, hidden_states[None], batch=1, layer=None, turn=turn)
    images = zip(*(each.split(cu_seqlens.diff().tolist(), 2) for each in (query, key, value)), strict=True)
    options: dict[str, Any] = {"scaling": self.scaling, "is_causal": False, "eager": plain_attention, **keywords}
    return self.proj(torch.cat([attend(self, q, k, v, None, **options)[0] for q, k, v in images], 1)[0])
