"""How often a classifier of images or sequences is right, and how sure of the right class it is."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from ..core.errors import UserError
from ..corpus.samples import Sample, batches
from .placing import placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """`accuracy` is a share, `cross_entropy` in nats. Beside a reference, `kl` is the mean KL(reference || model) and
    `agreement` the share of items that both put into the same class."""

    num_items: int
    accuracy: float
    cross_entropy: float
    seconds: float
    reference_accuracy: float | None = None
    reference_cross_entropy: float | None = None
    kl: float | None = None
    agreement: float | None = None


@torch.no_grad()
def evaluate(
    model: "PreTrainedModel",
    sample: Sample | Iterable[Sample],
    *,
    reference: "PreTrainedModel | None" = None,
    batch_size: int = BATCH_SIZE,
) -> Classification:
    """An open model, and its reference, on items with `labels` (item,): one sample, or many read as they are needed.

    Log-probabilities are taken in float32 (float64 for float64 logits) and summed in float64.

    Raises:
        UserError: the items have no labels or the model no such class; the model has no classifier.
    """
    start, count = time.perf_counter(), 0
    sums = torch.zeros(6, dtype=torch.float64)
    for part in [sample] if isinstance(sample, dict) else sample:
        for batch in batches(part, batch_size):
            inputs, labels = _split(batch)
            ours = _log_probabilities(model, inputs, labels)
            theirs = ours if reference is None else _log_probabilities(reference, inputs, labels)
            sums += torch.stack([*_scores(ours, labels), *_scores(theirs, labels), *_beside(ours, theirs)])
            count += len(labels)
    accuracy, loss, reference_accuracy, reference_loss, kl, agreement = (sums / count).tolist()
    seconds = time.perf_counter() - start
    alone = {"num_items": count, "accuracy": accuracy, "cross_entropy": loss, "seconds": seconds}
    if reference is None:
        return Classification(**alone)
    return Classification(
        **alone,
        reference_accuracy=reference_accuracy,
        reference_cross_entropy=reference_loss,
        kl=kl,
        agreement=agreement,
    )


def _split(batch: Sample) -> tuple[Sample, Tensor]:
    if "labels" not in batch:
        raise UserError("accuracy needs a class for every item, found none; name its column with --columns ITEM,LABEL")
    return {name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"]


def _log_probabilities(model: "PreTrainedModel", inputs: Sample, labels: Tensor) -> Float[Tensor, "item class"]:
    output = model(**placed(inputs, model))
    if "logits" not in output or output.logits.ndim != 2:
        raise UserError(f"{type(model).__name__}: expected a classifier, got a model that names no class of an item")
    logits = output.logits.cpu()
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(
            f"{type(model).__name__}: has classes 0 to {logits.shape[1] - 1}, got labels {found}; name another column"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _scores(log_probabilities: Float[Tensor, "item class"], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Right answers and losses, each summed in float64."""
    losses = -log_probabilities.gather(1, labels[:, None])
    return (log_probabilities.argmax(1) == labels).double().sum(), losses.double().sum()


def _beside(ours: Float[Tensor, "item class"], theirs: Float[Tensor, "item class"]) -> tuple[Tensor, Tensor]:
    """KL(theirs || ours) and equal answers, each summed in float64."""
    divergences = kl_div(ours, theirs, reduction="none", log_target=True)
    return divergences.double().sum(), (ours.argmax(1) == theirs.argmax(1)).double().sum()
