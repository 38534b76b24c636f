"""CodeGen: the first dims of every head rotate, in pairs; rows of the fused projection are in four shards: query, value, key."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("codegen",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="transformer.h.{layer}.attn",
            qkv="qkv_proj",
            o="out_proj",
            fused="four-shards",
            layers="n_layer",
            heads="n_head",
            hidden_size="n_embd",
            input_norm="ln_1",
            kv_heads="",
        ),
    ),
    position=Rope(interleaved=True, dim="rotary_dim"),
    defaults={"n_layer": 28, "n_head": 16, "n_embd": 4096, "rotary_dim": 64},
)
