"""Qwen 3 MoE: the attention of Qwen 3, with norms of single q and k heads, with experts."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("qwen3_moe",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            q_norm="q_norm",
            k_norm="k_norm",
        ),
    ),
    position=Rope(),
    defaults={"num_key_value_heads": 4},
)
