"""GPT-2: learned positions; q, k and v in one projection that is stored (in, out)."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("gpt2",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="transformer.h.{layer}.attn",
            qkv="c_attn",
            o="c_proj",
            transposed=True,
            layers="n_layer",
            heads="n_head",
            hidden_size="n_embd",
            input_norm="ln_1",
            kv_heads="",
        ),
    ),
    defaults={"n_layer": 12, "n_head": 12, "n_embd": 768},
    refuses={
        "add_cross_attention": "its cross-attention shares one projection between K and V, which no literal describes yet"
    },
)
