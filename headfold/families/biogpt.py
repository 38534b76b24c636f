"""BioGPT: learned positions, so K has no position."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("biogpt",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="biogpt.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            input_norm="self_attn_layer_norm",
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024},
)
