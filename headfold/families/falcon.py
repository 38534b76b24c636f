"""Falcon: rotary, or ALiBi where the config says so; one projection by K/V head: its queries, its key, its value.

That is the layout of all three: a key per query head (rw), one for all (7B), or several (new decoder, 40B and 180B).
"""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("falcon",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="transformer.h.{layer}.self_attention",
            qkv="query_key_value",
            o="dense",
            fused="per-group",
            alibi="alibi",
            kv_heads="",
        ),
    ),
    position=Rope(),
)
