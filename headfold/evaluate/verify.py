"""Verification of a fold: its logits, under stock transformers, are compared with those of the head-repeated twin of its plan."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibration import Sample, decoder_inputs, num_tokens, without_cache
from ..core.progress import Progress, counter, no_progress
from ..divergence import TOLERANCE
from ..hf_models import open_model, stored_dtype
from .placement import place_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUTS = ("logits", "logits_per_text", "prediction_logits", "start_logits", "last_hidden_state")
"""The outputs that can be compared; the first one that the model has is used."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing a fold with its twin. `where` names the first part that differs, None where none does."""

    passed: bool
    max_abs_difference: float
    tolerance: float
    """Absolute: the entry of `TOLERANCE` times the root mean square of the twin's logits."""
    dtype: str
    num_tokens: int
    where: str | None


@torch.no_grad()
def compare_with_twin(
    source_dir: str | Path,
    out_dir: str | Path,
    expected: Mapping[str, Tensor],
    sample: Sample,
    *,
    renamed: Mapping[str, str] | None = None,
    source_class: Any = None,
    fold_class: Any = None,
    unrounded: Mapping[str, Tensor] | None = None,
    make_twin: Callable[["PreTrainedModel"], "PreTrainedModel"] | None = None,
    device: str = "cpu",
    memory_limit: int | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Compare the logits of a fold with those of its head-repeated twin, which is the source with other attention weights.

    `expected` gives the twin's replaced tensors by their names on disk in the source, in the source's shapes and dtype; it may be
    lazy. `renamed` and the classes are those of `open_model`. `unrounded` gives weights of the fold before they were rounded,
    where an export multiplied some. `make_twin` makes the twin from the opened source instead, where their shapes differ. The
    models are opened one after the other, and streamed from disk where they exceed the memory, so that only a few windows of
    logits are held besides. A wrong logit anywhere, NaN included, fails the comparison.

    Raises:
        UserError: the fold does not load in stock transformers.
    """
    dtype = torch.promote_types(stored_dtype(source_dir), torch.float32)
    opened = partial(open_model, dtype=dtype, device=device, memory_limit=memory_limit)

    def open_twin() -> "PreTrainedModel":
        if make_twin is not None:
            return make_twin(opened(source_dir, model_class=source_class))
        return opened(source_dir, overlay=expected, renamed=renamed, model_class=source_class)

    def open_fold() -> "PreTrainedModel":
        return opened(out_dir, model_class=fold_class, overlay=unrounded)

    advance = counter(progress, "verify", 2)
    twin = _outputs(open_twin(), sample)
    advance(1)
    fold = _outputs(open_fold(), sample)
    advance(1)
    difference = (fold - twin).abs().flatten(1).amax(1)
    tolerance = TOLERANCE[dtype] * _scale(twin)
    passed = bool((difference <= tolerance).all())
    where = None
    if not passed:
        worst = {name: tensor[difference.argmax()][None] for name, tensor in sample.items()}
        states = (_hidden_states(open_twin(), worst), _hidden_states(open_fold(), worst))
        where = _first_difference(*states, TOLERANCE[dtype])
    return Verification(
        passed, difference.max().item(), tolerance, str(dtype).removeprefix("torch."), num_tokens(sample), where
    )


def _outputs(model: "PreTrainedModel", sample: Sample) -> Float[Tensor, "item *output"]:
    """Return logits, or the last hidden states of a model without a head."""
    return model_output(model, sample)[1].cpu()


def model_output(model: "PreTrainedModel", sample: Sample) -> tuple[str, Tensor]:
    """Return name and value of the first of `OUTPUTS` that the model has."""
    output = model(**model_inputs(model, sample))
    name = next(name for name in OUTPUTS if name in output)
    return name, output[name]


def model_inputs(model: "PreTrainedModel", sample: Sample) -> dict[str, Any]:
    """Return the inputs of a sample that the model takes, on its device, without labels and without a cache."""
    known = inspect.signature(model.forward).parameters
    # Not as labels: a loss over them is no business of this comparison, and not every head can take them.
    labels = sample.get("labels")
    decodes = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in sample
    if decodes and labels is not None and labels.ndim == 2:
        sample = {**sample, "decoder_input_ids": decoder_inputs(model, labels)}
    wanted = {name: tensor for name, tensor in sample.items() if name != "labels" and name in known}
    return place_batch(wanted, model) | without_cache(model, model.forward)


def _hidden_states(model: "PreTrainedModel", sample: Sample) -> tuple[Tensor, ...]:
    """Return the embeddings and the output of each layer; those of the encoder first."""
    output = model(**model_inputs(model, sample), output_hidden_states=True)
    names = ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")
    return tuple(state.cpu() for name in names for state in output.get(name) or ())


def _scale(reference: Tensor) -> float:
    """Return the root mean square, accumulated in float64."""
    return reference.to(torch.float64).pow(2).mean().sqrt().item()


def _first_difference(twin: tuple[Tensor, ...], fold: tuple[Tensor, ...], relative: float) -> str:
    """Return the first layer whose output differs by more than the tolerance, `embeddings` before them or `output head` after them."""
    for depth, (expected, found) in enumerate(zip(twin, fold, strict=True)):
        if not (found - expected).abs().max().item() <= relative * _scale(expected):
            return f"layers.{depth - 1}" if depth else "embeddings"
    return "output head"


@torch.no_grad()
def compared_output(model: "PreTrainedModel", sample: Sample) -> Tensor:
    """Return the first of `OUTPUTS` that the model has, on the CPU."""
    return model_output(model, dict(sample))[1].cpu()
