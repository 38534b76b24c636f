"""EuroBERT: a Llama without a causal mask."""

from dataclasses import replace

from .llama import FAMILY as LLAMA
from .spec import Family, Rope

FAMILY = Family(
    model_types=("eurobert",),
    attentions=(replace(LLAMA.attentions[0], any_head_dim=False),),
    position=Rope(),
)
