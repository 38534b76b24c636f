"""A stock class with one number of K/V heads and equal groups: any engine that knows the class reads it."""

from ...checkpoint.reader import Checkpoint
from .. import llama_like, phi
from ..folded import Folded
from ..layout import ExportLayout
from ..pieces import Export


def why_not(source: Folded) -> str | None:
    """Return why no stock class holds the model; those of Llama's kind stay in their own class."""
    return None if source.model_type in llama_like.MODEL_TYPES else phi.why_not(source)


def export(checkpoint: Checkpoint, source: Folded) -> Export:
    """Return the same class with its query heads in standard order, or the Phi model of a GPT-NeoX or GPT-J."""
    if source.model_type in llama_like.MODEL_TYPES:
        return llama_like.in_standard_order(checkpoint, source, LAYOUT.name)
    return phi.as_phi(checkpoint, source, LAYOUT.name)


LAYOUT = ExportLayout(
    name="native",
    model_types=(*llama_like.MODEL_TYPES, *phi.MODEL_TYPES),
    why_not=why_not,
    export=export,
    needs_one_count=True,
    needs_equal_groups=True,
    pads_groups_to="layer",
    priority=0,
)
