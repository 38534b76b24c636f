"""A stock class for groups of different sizes: zero query heads fill every group up to the largest one of the model."""

from ...checkpoint.reader import Checkpoint
from .. import llama_like, phi
from ..folded import Folded
from ..layout import ExportLayout
from ..pieces import Export


def why_not(source: Folded) -> str | None:
    """Return why the model cannot or need not be padded."""
    if source.is_even:
        return "expected groups of different sizes, got equal ones, which need none"
    return llama_like.why_not(source) if source.model_type in llama_like.MODEL_TYPES else phi.why_not(source)


def export(checkpoint: Checkpoint, source: Folded) -> Export:
    """Return a class that reads any `head_dim` with the zero heads added, or the Phi model of a GPT-NeoX or GPT-J."""
    make = llama_like.padded if source.model_type in llama_like.MODEL_TYPES else phi.as_phi
    return make(checkpoint, source, LAYOUT.name)


LAYOUT = ExportLayout(
    name="padded",
    model_types=(*llama_like.MODEL_TYPES, *phi.MODEL_TYPES),
    why_not=why_not,
    export=export,
    needs_one_count=True,
    needs_equal_groups=False,
    pads_groups_to="model",
    priority=1,
)
