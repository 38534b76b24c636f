"""GPT-OSS: a sink per query head joins the softmax, and moves with its head."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("gpt_oss",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            sinks="sinks",
        ),
    ),
    position=Rope(),
    defaults={"num_key_value_heads": 8, "head_dim": 64},
)
