"""Accuracy and cross-entropy of a classifier of images or sequences, alone or beside a reference."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..corpus.samples import Sample
from ..metrics.bootstrap import Units, mean_of
from .placement import place_batch
from .sharing import run_on_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 64
QUANTITIES = ("accuracy", "cross_entropy", "reference_accuracy", "reference_cross_entropy", "kl", "agreement")
"""The quantities of every item; only the first two without a reference."""
LOSSES = ("cross_entropy", "kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """`accuracy` is a share, `cross_entropy` is in nats. Beside a reference, `kl` is the mean KL(reference ‖ model) and `agreement`
    the share of items that both models assign to the same class.
    """

    num_items: int
    accuracy: float
    cross_entropy: float
    seconds: float
    reference_accuracy: float | None = None
    reference_cross_entropy: float | None = None
    kl: float | None = None
    agreement: float | None = None


def evaluate_classification(
    model: "PreTrainedModel",
    sample: Sample | Iterable[Sample],
    *,
    reference: "PreTrainedModel | None" = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> Classification:
    """Measure an open model, and its reference, on items with `labels` (item,): one sample, or several that are read as needed.

    Log-probabilities are computed in float32 (float64 for float64 logits) and summed in float64.

    Raises:
        UserError: the items have no labels or labels that the model does not have; the model is not a classifier.
    """
    start = time.perf_counter()
    items = _items(model, sample, reference, batch_size, progress)
    means = dict(zip(QUANTITIES, (items.sum(0) / len(items)).tolist(), strict=True))
    seconds = time.perf_counter() - start
    return Classification(num_items=len(items), seconds=seconds, **{name: means[name] for name in _measured(reference)})


def scores_per_item(
    model: "PreTrainedModel",
    sample: Sample | Iterable[Sample],
    *,
    reference: "PreTrainedModel | None" = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> list[Units]:
    """Return the scores of `evaluate_classification` item by item.

    Raises:
        UserError: as `evaluate_classification`.
    """
    items = _items(model, sample, reference, batch_size, progress)
    names = [name for name in _measured(reference) if not name.startswith("reference_")]
    return [
        mean_of(name, "items", items[:, QUANTITIES.index(name)].numpy(), lower_is_better=name in LOSSES)
        for name in names
    ]


def _measured(reference: "PreTrainedModel | None") -> tuple[str, ...]:
    return QUANTITIES[: 2 if reference is None else None]


@torch.no_grad()
def _items(
    model: "PreTrainedModel",
    sample: Sample | Iterable[Sample],
    reference: "PreTrainedModel | None",
    batch_size: int,
    progress: Progress,
) -> Float[Tensor, "item quantity"]:
    """Return `QUANTITIES` of every item, in float64."""

    def scores(batch: Sample) -> Float[Tensor, "item quantity"]:
        inputs, labels = _split(batch)
        ours = _log_probabilities(model, inputs, labels)
        theirs = ours if reference is None else _log_probabilities(reference, inputs, labels)
        columns = (*_scores(ours, labels), *_scores(theirs, labels), *_beside(ours, theirs))
        return torch.stack([column.double() for column in columns], 1)

    return torch.cat(run_on_items(sample, batch_size, scores, progress, "classify"))


def _split(batch: Sample) -> tuple[Sample, Tensor]:
    if "labels" not in batch:
        raise UserError("accuracy needs a class for every item, found none; name its column with --columns ITEM,LABEL")
    return {name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"]


def _log_probabilities(model: "PreTrainedModel", inputs: Sample, labels: Tensor) -> Float[Tensor, "item class"]:
    output = model(**place_batch(inputs, model))
    if "logits" not in output or output.logits.ndim != 2:
        raise UserError(f"{type(model).__name__}: expected a classifier, got a model without logits per class")
    logits = output.logits.cpu()
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(
            f"{type(model).__name__}: has classes 0 to {logits.shape[1] - 1}, got labels {found}; name another column"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _scores(log_probabilities: Float[Tensor, "item class"], labels: Tensor) -> tuple[Tensor, Float[Tensor, " item"]]:
    """Return whether each answer is right, and its loss."""
    losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
    return log_probabilities.argmax(1) == labels, losses


def _beside(
    ours: Float[Tensor, "item class"], theirs: Float[Tensor, "item class"]
) -> tuple[Float[Tensor, " item"], Tensor]:
    """Return KL(theirs ‖ ours) of each item, and whether both models choose the same class."""
    divergences = kl_div(ours, theirs, reduction="none", log_target=True)
    return divergences.double().sum(1), ours.argmax(1) == theirs.argmax(1)
