"""Phi 3, 3.5 and 4: q, k and v in one projection; Phi 4 mini rotates three quarters of every head."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("phi3",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            qkv="qkv_proj",
            o="o_proj",
        ),
    ),
    position=Rope(fraction="partial_rotary_factor"),
)
