"""wav2vec2 and HuBERT: positions come from a convolution before the layers, so K has no position; the input is sound."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("wav2vec2", "hubert"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="{model_type}.encoder.layers.{layer}.attention",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            kv_heads="",
        ),
    ),
    defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
)
