"""Gemma 1: heads · head_dim need not be hidden_size, and the embeddings are also the output head."""

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
