"""Qwen 1.5, 2 and 2.5: biases on q, k and v."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("qwen2",),
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
    defaults={"num_key_value_heads": 32},
)
