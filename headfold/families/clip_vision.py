"""The vision model of CLIP or SigLIP alone: a ViT."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("clip_vision_model", "siglip_vision_model"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="vision_model.encoder.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            input_norm="layer_norm1",
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
)
