"""StableLM 3B and StableLM 2: a quarter of every head rotates."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("stablelm",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            any_head_dim=False,
            fixed_head_dim=True,
        ),
    ),
    position=Rope(fraction="partial_rotary_factor"),
    defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25},
    refuses={
        "qk_layernorm": "every K head has its own LayerNorm, but heads that share one K head would need a common one"
    },
)
