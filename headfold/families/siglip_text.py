"""SigLIP's text model alone: CLIP's, with attention in both directions and other defaults."""

from .clip_text import FAMILY as CLIP_TEXT
from .spec import Family

FAMILY = Family(
    model_types=("siglip_text_model",),
    attentions=CLIP_TEXT.attentions,
    defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
)
