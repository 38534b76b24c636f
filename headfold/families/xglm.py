"""XGLM: sinusoidal positions, so K has no position."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("xglm",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            layers="num_layers",
            heads="attention_heads",
            hidden_size="d_model",
            input_norm="self_attn_layer_norm",
            kv_heads="",
        ),
    ),
    defaults={"num_layers": 24, "attention_heads": 16, "d_model": 1024},
)
