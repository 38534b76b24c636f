"""GPT-Neo: learned positions, no softmax scale; every second layer has local attention, which folding does not change."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("gpt_neo",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="transformer.h.{layer}.attn",
            q="attention.q_proj",
            k="attention.k_proj",
            v="attention.v_proj",
            o="attention.out_proj",
            core="attention",
            layers="num_layers",
            heads="num_heads",
            input_norm="ln_1",
            kv_heads="",
        ),
    ),
    defaults={"num_layers": 24, "num_heads": 16, "hidden_size": 2048},
)
