"""ViT and DeiT: learned positions, biases; transformers 5 renames the projections on loading."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("vit", "deit"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="{model_type}.encoder.layer.{layer}.attention",
            q="attention.query",
            k="attention.key",
            v="attention.value",
            o="output.dense",
            model_at="{model_type}.layers.{layer}.attention",
            model_names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
            input_norm="layernorm_before",
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
)
