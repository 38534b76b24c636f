"""Falcon: RoPE, or ALiBi if the config says so; one projection with the rows of each K/V head together: its queries, key, value.

All versions have this layout: a key per query head (rw), one for all (7B), or several (new decoder, 40B and 180B).
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
