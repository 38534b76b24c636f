"""Nemotron and Minitron: half of every head rotates; norm gains are stored minus one."""

from .spec import Attention, Family, Rope

FAMILY = Family(
    model_types=("nemotron",),
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
    position=Rope(fraction="partial_rotary_factor"),
    norm_gain_offset=1.0,
    defaults={"partial_rotary_factor": 0.5},
)
