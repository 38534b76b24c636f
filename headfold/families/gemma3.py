"""Gemma 3's text models: q and k heads pass norms, whose gains are stored minus one, as in Gemma 1."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("gemma3_text",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            scale="query_pre_attn_scalar",
            q_norm="q_norm",
            k_norm="k_norm",
        ),
    ),
    position=Rope(),
    norm_gain_offset=1.0,
    defaults={"num_key_value_heads": 4, "head_dim": 256},
)
