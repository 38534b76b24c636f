"""BLOOM: ALiBi, so K has no position and the order of heads is fixed; rows of the fused projection are by head: query, key,
value."""

from .spec import Attention, Family

FAMILY = Family(
    model_types=("bloom",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="transformer.h.{layer}.self_attention",
            qkv="query_key_value",
            o="dense",
            fused="per-group",
            alibi="*",
            layers="n_layer|num_hidden_layers",
            heads="n_head|num_attention_heads",
            hidden_size="n_embed|hidden_size",
            kv_heads="",
        ),
    ),
)
