"""Seed-OSS: Llama's attention with biases on q, k and v."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("seed_oss",),
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
    defaults={"num_key_value_heads": 8, "head_dim": 128},
)
