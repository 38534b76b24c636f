"""GPT-NeoX and Pythia: a share of every head rotates, a quarter by default; rows of the fused projection are by head: query, key,
value."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("gpt_neox",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="gpt_neox.layers.{layer}.attention",
            qkv="query_key_value",
            o="dense",
            fused="per-group",
            kv_heads="",
        ),
    ),
    position=Rope(fraction="partial_rotary_factor|rotary_pct"),
    defaults={"rotary_pct": 0.25},
)
