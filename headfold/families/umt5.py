"""UMT5: T5 with a table of relative position bias in every layer, so that every layer may order its heads differently."""

from typing import Any

from .spec import Attention, Family
from .t5 import NAMES

_DECODER: dict[str, Any] = {
    **NAMES,
    "layers": "num_decoder_layers|num_layers",
    "stack": "decoder",
    "input_norm": "layer_norm",
}

FAMILY = Family(
    model_types=("umt5",),
    attentions=(
        Attention(
            name="encoder.{layer}.self",
            at="encoder.block.{layer}.layer.0.SelfAttention",
            bias_table="relative_attention_bias",
            layers="num_layers",
            stack="encoder",
            optional=True,
            input_norm="layer_norm",
            **NAMES,
        ),
        Attention(
            name="decoder.{layer}.self",
            at="decoder.block.{layer}.layer.0.SelfAttention",
            bias_table="relative_attention_bias",
            **_DECODER,
        ),
        Attention(
            name="decoder.{layer}.cross",
            at="decoder.block.{layer}.layer.1.EncDecAttention",
            reads_encoder=True,
            **_DECODER,
        ),
    ),
    defaults={"d_kv": 64, "num_heads": 6, "num_layers": 8},
)
