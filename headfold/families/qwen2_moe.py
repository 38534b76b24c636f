"""Qwen 1.5 MoE and Qwen 2 MoE: the attention of Qwen 2, with experts."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("qwen2_moe",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
        ),
    ),
    position=Rope(),
    defaults={"num_key_value_heads": 16},
)
