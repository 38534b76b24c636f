"""OPT: learned positions, so K has no position."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("opt",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.decoder.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            input_norm="self_attn_layer_norm",
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
)
