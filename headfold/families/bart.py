"""BART, mBART, Marian, M2M100 and NLLB: learned or sinusoidal positions, so K has no position; encoder and decoder have their own
numbers of heads."""

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
    model_types=("bart", "mbart", "marian", "m2m_100"),
    attentions=(
        Attention(
            name="encoder.{layer}.self",
            at="model.encoder.layers.{layer}.self_attn",
            layers="encoder_layers",
            heads="encoder_attention_heads",
            stack="encoder",
            optional=True,
            **_NAMES,
        ),
        Attention(
            name="decoder.{layer}.self",
            at="model.decoder.layers.{layer}.self_attn",
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
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
    },
)
