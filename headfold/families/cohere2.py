"""Command R7B and Command A: a frequency plane is two neighbouring dims; layers with global attention have no position."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("cohere2",),
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
    position=Rope(interleaved=True, layers="layer_types"),
)
