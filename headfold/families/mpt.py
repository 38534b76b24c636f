"""MPT: ALiBi, so K has no position and the order of heads is fixed; q, k and v in one projection."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("mpt",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="transformer.blocks.{layer}.attn",
            qkv="Wqkv",
            o="out_proj",
            alibi="*",
            layers="n_layers",
            heads="n_heads",
            hidden_size="d_model",
            input_norm="norm_1",
            kv_heads="",
        ),
    ),
    defaults={"n_layers": 24, "n_heads": 16, "d_model": 2048},
    refuses={
        "attn_config.clip_qkv": "it clamps the elements of q, k and v, and what absorb writes into them has other elements",
        "attn_config.qk_ln": "q and k pass a LayerNorm over all heads, whose statistic changes with their number",
    },
)
