"""Gemma 2: every second layer has sliding-window attention, and logits are soft-capped; folding changes neither."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("gemma2",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            scale="query_pre_attn_scalar",
        ),
    ),
    position=Rope(),
    norm_gain_offset=1.0,
    defaults={"num_key_value_heads": 4, "head_dim": 256},
)
