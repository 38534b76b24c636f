"""GLM 4: half of every head rotates, in planes of two neighbouring dims."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("glm", "glm4"),
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
    position=Rope(interleaved=True, fraction="partial_rotary_factor"),
    defaults={"num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5},
)
