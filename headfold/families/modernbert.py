"""ModernBERT: RoPE with two tables, for layers with and without a window; q, k and v are one projection."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("modernbert",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.attn",
            qkv="Wqkv",
            o="Wo",
            input_norm="attn_norm",
            kv_heads="",
        ),
    ),
    position=Rope(),
    defaults={"num_hidden_layers": 22, "num_attention_heads": 12, "hidden_size": 768},
)
