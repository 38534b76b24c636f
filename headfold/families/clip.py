"""CLIP: a text and a vision model in one checkpoint, each with its own config; learned positions in both."""

from typing import Any

from .spec import Attention, Family

_NAMES: dict[str, Any] = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "out_proj",
    "kv_heads": "",
    "input_norm": "layer_norm1",
}

FAMILY = Family(
    model_types=("clip",),
    attentions=(
        Attention(
            name="text.{layer}.self",
            at="text_model.encoder.layers.{layer}.self_attn",
            layers="text_config.num_hidden_layers",
            heads="text_config.num_attention_heads",
            hidden_size="text_config.hidden_size",
            stack="text",
            **_NAMES,
        ),
        Attention(
            name="vision.{layer}.self",
            at="vision_model.encoder.layers.{layer}.self_attn",
            layers="vision_config.num_hidden_layers",
            heads="vision_config.num_attention_heads",
            hidden_size="vision_config.hidden_size",
            stack="vision",
            **_NAMES,
        ),
    ),
    defaults={
        "text_config.num_hidden_layers": 12,
        "text_config.num_attention_heads": 8,
        "text_config.hidden_size": 512,
        "vision_config.num_hidden_layers": 12,
        "vision_config.num_attention_heads": 12,
        "vision_config.hidden_size": 768,
    },
)
