"""Gemma 1: heads need not add up to hidden_size, and the embeddings are the output head too."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("gemma",),
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
    norm_gain_offset=1.0,
    defaults={"num_key_value_heads": 16, "head_dim": 256},
)
