"""Moves batches to the device of their model."""

from typing import TYPE_CHECKING

from ..corpus.samples import Sample
from ..hf_models.streamed import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place_batch(batch: Sample, model: "PreTrainedModel") -> Sample:
    """Return the batch on the model's device, with its real numbers (pixels, sound) in the model's dtype."""
    device, dtype = input_device(model), model.dtype
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in batch.items()}
