"""InternVL's tower: a ViT whose class fixes the number of heads."""

from typing import Any

from torch import Tensor

from ..projections import attend, keys_and_values, project


def internvl_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """`InternVLVisionAttention.forward` over grouped heads: return the output (batch, patch, model), and the weights."""
    batch = hidden_states.shape[0]
    query = project(self, "q", hidden_states, batch=batch)
    key, value = keys_and_values(self, hidden_states, batch=batch, layer=None)
    options = {"dropout": self.attention_dropout, "scaling": self.scale, "is_causal": False, **keywords}
    context, weights = attend(self, query, key, value, attention_mask, **options)
    return self.projection_dropout(self.projection_layer(context)), weights
