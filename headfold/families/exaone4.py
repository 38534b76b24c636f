"""EXAONE 4: q and k heads pass norms. Its layers with global attention have no position, but are folded as if they had.

One sign per frequency plane is allowed where nothing rotates too: it is part of the freedom of those layers, not all of it.
"""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("exaone4",),
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
        ),
    ),
    position=Rope(),
    defaults={"num_key_value_heads": 32},
)
