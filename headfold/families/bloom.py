"""BLOOM: ALiBi, so K carries no position and heads keep their places; each head's query, key and value rows lie together."""

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
            width="n_embed|hidden_size",
            kv_heads="",
        ),
    ),
)
