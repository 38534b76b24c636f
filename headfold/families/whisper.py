"""Whisper: BART's sites without a bias on K, with the norm before them; the encoder's input is speech."""

from typing import Any

from .spec import Attention, Family

_NAMES: dict[str, Any] = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "out_proj",
    "kv_heads": "",
    "hidden_size": "d_model",
}
_DECODER: dict[str, Any] = {
    **_NAMES,
    "layers": "decoder_layers",
    "heads": "decoder_attention_heads",
    "stack": "decoder",
}

FAMILY = Family(
    model_types=("whisper",),
    attentions=(
        Attention(
            name="encoder.{layer}.self",
            at="model.encoder.layers.{layer}.self_attn",
            layers="encoder_layers",
            heads="encoder_attention_heads",
            stack="encoder",
            optional=True,
            input_norm="self_attn_layer_norm",
            **_NAMES,
        ),
        Attention(
            name="decoder.{layer}.self",
            at="model.decoder.layers.{layer}.self_attn",
            input_norm="self_attn_layer_norm",
            **_DECODER,
        ),
        Attention(
            name="decoder.{layer}.cross",
            at="model.decoder.layers.{layer}.encoder_attn",
            reads_encoder=True,
            **_DECODER,
        ),
    ),
    defaults={
        "d_model": 384,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 6,
    },
)
