"""Command R: a frequency plane is two neighbouring dims."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("cohere",),
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
    position=Rope(interleaved=True),
    refuses={
        "use_qk_norm": "every K head has its own norm gains, but heads that share one K head would need common gains"
    },
)
