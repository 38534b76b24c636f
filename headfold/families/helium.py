"""Helium: Llama's attention, but a frequency plane is two neighbouring dims."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("helium",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            any_head_dim=False,
        ),
    ),
    position=Rope(interleaved=True),
    defaults={"num_key_value_heads": 20, "head_dim": 128},
)
