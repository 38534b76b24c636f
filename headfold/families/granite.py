"""Granite 3 and its mixtures of experts: Llama's attention with a logit scale from the config."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("granite", "granitemoe", "granitemoeshared"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            scale="attention_multiplier",
        ),
    ),
    position=Rope(),
)
