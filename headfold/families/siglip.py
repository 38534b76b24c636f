"""SigLIP: CLIP's two towers with other defaults; its texts are padded to one length, and the padding counts as text."""

from .clip import FAMILY as CLIP
from .spec import Family

FAMILY = Family(
    model_types=("siglip",),
    attentions=CLIP.attentions,
    defaults={
        f"{tower}_config.{name}": value
        for tower in ("text", "vision")
        for name, value in (("num_hidden_layers", 12), ("num_attention_heads", 12), ("hidden_size", 768))
    },
)
