"""T5, FLAN-T5 and mT5: no scaling, no biases, one table of relative position bias per stack, added to the logits."""

from typing import Any

from .spec import Attention, Family

NAMES: dict[str, Any] = {
    "q": "q",
    "k": "k",
    "v": "v",
    "o": "o",
    "heads": "num_heads",
    "kv_heads": "",
    "head_dim": "d_kv",
    "hidden_size": "d_model",
}
_DECODER: dict[str, Any] = {
    **NAMES,
    "layers": "num_decoder_layers|num_layers",
    "stack": "decoder",
    "input_norm": "layer_norm",
}

FAMILY = Family(
    model_types=("t5", "mt5"),
    attentions=(
        Attention(
            name="encoder.{layer}.self",
            at="encoder.block.{layer}.layer.0.SelfAttention",
            bias_table="relative_attention_bias",
            layers="num_layers",
            stack="encoder",
            order="stack",
            optional=True,
            input_norm="layer_norm",
            **NAMES,
        ),
        Attention(
            name="decoder.{layer}.self",
            at="decoder.block.{layer}.layer.0.SelfAttention",
            bias_table="relative_attention_bias",
            order="stack",
            **_DECODER,
        ),
        Attention(
            name="decoder.{layer}.cross",
            at="decoder.block.{layer}.layer.1.EncDecAttention",
            reads_encoder=True,
            **_DECODER,
        ),
    ),
    defaults={"d_kv": 64, "num_heads": 8, "num_layers": 6},
)
