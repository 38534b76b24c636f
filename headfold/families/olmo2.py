"""OLMo 2 and 3, OLMoE: one norm spans all q heads and one all k heads, so a fold is approximate.

Fewer K heads make another root mean square; the gains of the fold are fitted so that it is nearest to the original's (docs/absorb.md, 8).
"""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("olmo2", "olmo3", "olmoe"),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            q_norm="q_norm",
            k_norm="k_norm",
            norm_spans_heads=True,
        ),
    ),
    position=Rope(),
    refuses={"clip_qkv": "q, k and v are clamped after their projections, and no merge of heads commutes with that"},
)
