"""OLMo 1, without clipping of q, k and v."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("olmo",),
    attentions=(
        Attention(
            name="layers.{layer}.self",
            at="model.layers.{layer}.self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
        ),
    ),
    position=Rope(),
    refuses={"clip_qkv": "q, k and v are clamped after their projections, and no merge of heads commutes with that"},
)
