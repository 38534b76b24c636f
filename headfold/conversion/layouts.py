"""Write a fold in the layout of a stock class or an engine, and compare its logits with those of headfold's runtime."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import wrong_output
from ..core.progress import Progress, counter
from ..corpus.samples import random_sample
from ..divergence import difference_and_tolerance
from ..exports.folded import open_folded
from ..exports.layout import make_export
from ..exports.pieces import Export, write_export
from ..exports.rounding import Unrounded
from ..hf_models import open_model, stored_dtype
from ..runtime.load import own_class
from .verification import ITEMS


def write_layout(folded: Path, target: Path, layout: str, progress: Callable[[int, int], None]) -> Export:
    """Write the grouped checkpoint `folded`, as headfold's runtime reads it, into the existing directory `target` in `layout`."""
    checkpoint, source = open_folded(folded)
    made = make_export(checkpoint, source, layout)
    write_export(checkpoint, made, target, progress)
    return made


@torch.no_grad()
def compare_layouts(
    checkpoint: Checkpoint,
    made: Export,
    staging: Path,
    progress: Progress,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """Return the largest difference of logits on random tokens between `checkpoint` and its export in `staging`, and the tolerance.

    Both compute in `dtype`: float32 or float64, by default the first that holds the weights.

    Raises:
        UserError: they differ by more; the output stays in `staging`.
    """
    sample = random_sample("sentences", checkpoint.config, ITEMS)
    advance = counter(progress, "verify", 2)
    dtype = torch.promote_types(dtype or stored_dtype(checkpoint.path), torch.float32)
    inputs = {name: tensor.to(device) for name, tensor in sample.items()}
    grouped_class = own_class(checkpoint.config, checkpoint.path)
    opened = open_model(checkpoint.path, dtype=dtype, device=device, model_class=grouped_class)
    expected = opened(**inputs, use_cache=False).logits.cpu()
    advance(1)
    overlay = Unrounded(checkpoint, made, staging, dtype)
    opened = open_model(staging, dtype=dtype, device=device, model_class=own_class(made.config), overlay=overlay)
    found = opened(**inputs, use_cache=False).logits.cpu()
    advance(1)
    difference, tolerance = difference_and_tolerance(found, expected, dtype)
    if not difference <= tolerance:
        raise wrong_output(
            staging,
            f"expected the logits of {checkpoint.path} within {tolerance:.2g}, got a difference of {difference:.2g}",
        )
    return difference, tolerance
