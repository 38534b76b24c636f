"""Mistral, Ministral and Mixtral: Llama's attention, in some layers with a sliding window, which folding does not change."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("mistral", "ministral", "mixtral"),
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
    defaults={"num_key_value_heads": 8},
)
