"""Moonshine: a Whisper that reads samples of sound, with RoPE in pairs on most dims of a head in both stacks."""

from typing import Any

from .spec import Attention, Family, Rope

_NAMES: dict[str, Any] = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "kv_heads": ""}
_DECODER: dict[str, Any] = {
    **_NAMES,
    "layers": "decoder_num_hidden_layers",
    "heads": "decoder_num_attention_heads",
    "stack": "decoder",
}

FAMILY = Family(
    model_types=("moonshine",),
    attentions=(
        Attention(
            name="encoder.{layer}.self",
            at="model.encoder.layers.{layer}.self_attn",
            layers="encoder_num_hidden_layers",
            heads="encoder_num_attention_heads",
            stack="encoder",
            optional=True,
            **_NAMES,
        ),
        Attention(name="decoder.{layer}.self", at="model.decoder.layers.{layer}.self_attn", **_DECODER),
        Attention(
            name="decoder.{layer}.cross",
            at="model.decoder.layers.{layer}.encoder_attn",
            reads_encoder=True,
            input_norm="post_attention_layernorm",
            **_DECODER,
        ),
    ),
    position=Rope(interleaved=True, fraction="partial_rotary_factor"),
    defaults={
        "hidden_size": 288,
        "encoder_num_hidden_layers": 6,
        "decoder_num_hidden_layers": 6,
        "encoder_num_attention_heads": 8,
        "decoder_num_attention_heads": 8,
        "partial_rotary_factor": 0.9,
    },
)
