"""ERNIE 4.5: Llama's attention, but a frequency plane is two neighbouring dims."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("ernie4_5",),
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
    defaults={"num_key_value_heads": 2, "head_dim": 128},
)
