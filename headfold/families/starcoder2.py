"""StarCoder 2: biases on all four projections."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("starcoder2",),
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
    defaults={"num_key_value_heads": 2},
)
