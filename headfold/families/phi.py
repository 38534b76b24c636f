"""Phi 1, 1.5 and 2: half of every head rotates, and all four projections have biases."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("phi",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="dense",
        ),
    ),
    position=Rope(fraction="partial_rotary_factor"),
    defaults={"partial_rotary_factor": 0.5},
    refuses={
        "qk_layernorm": "q and k pass a LayerNorm after their projections, and its mean and bias mix the dims of a head"
    },
)
