"""Qwen 3: every q and k head passes an RMS norm before RoPE, which leaves one sign per frequency plane of K free."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("qwen3",),
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
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
