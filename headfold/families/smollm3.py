"""SmolLM 3: every fourth layer has no position."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("smollm3",),
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
    position=Rope(layers="no_rope_layers"),
    defaults={"num_key_value_heads": 4},
)
