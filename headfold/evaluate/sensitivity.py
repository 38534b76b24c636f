"""What folding one site alone does to the model: the yardstick that makes predicted errors of different layers comparable."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration import Sample
from .verify import model_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
"""Numbers of the first input that run at once."""


@contextmanager
def replaced_parameters(model: "PreTrainedModel", tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other numbers in some of its parameters, by name; put back afterwards."""
    parameters = {name: model.get_parameter(name).data for name in tensors}
    before = {name: data.clone() for name, data in parameters.items()}
    try:
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        yield
    finally:
        for name, data in before.items():
            parameters[name].copy_(data)


class Divergence:
    """How far a changed model's answers are from the original's, on one sample.

    Models with logits: mean KL(original ‖ changed) per position, in nats. Others: squared error of the last hidden states by their energy.
    """

    def __init__(self, model: "PreTrainedModel", sample: Sample) -> None:
        self._model = model
        first = next(iter(sample.values()))
        at_once = max(1, BATCH_TOKENS // max(1, first[0].numel() if first.ndim == 2 else BATCH_TOKENS // 8))
        parts = {name: tensor.split(at_once) for name, tensor in sample.items()}
        self._batches = [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]
        self._original = [self._answer(batch) for batch in self._batches]

    def __call__(self) -> float:
        """Of the model as it is now."""
        found, count = 0.0, 0.0
        for batch, (original, weight) in zip(self._batches, self._original, strict=True):
            changed, _ = self._answer(batch)
            found += float((self._distance(original, changed) * weight).sum())
            count += float(weight.sum())
        return found / count

    @torch.no_grad()
    def _answer(self, batch: Sample) -> tuple[Tensor, Tensor]:
        """Log-probabilities or states, (item, …, last), and which positions count."""
        name, output = model_output(self._model, batch)
        if name == "logits":
            output = output.float().log_softmax(-1)
        weight = torch.ones(output.shape[:-1])
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if labels is not None and labels.shape == weight.shape:
            weight = (labels != -100).float()
        elif mask is not None and mask.shape == weight.shape:
            weight = mask.float()
        self._is_logits = name == "logits"
        return output, weight

    def _distance(self, original: Tensor, changed: Tensor) -> Tensor:
        if self._is_logits:
            return (original.exp() * (original - changed)).sum(-1).clamp_min(0).cpu()
        original, changed = original.float(), changed.float()
        return ((changed - original).square().sum(-1) / original.square().sum(-1).mean()).cpu()


def measure_sites_alone(
    model: "PreTrainedModel",
    sample: Sample,
    changes: Mapping[tuple[str, int], Callable[[], AbstractContextManager[None]]],
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[int, float]]:
    """The damage of each change alone. `changes` maps (name, K/V heads) to what makes the model a changed one while it is entered."""
    damage, found = Divergence(model, sample), {}
    for (name, count), make in changes.items():
        progress(name)
        with make():
            found.setdefault(name, {})[count] = damage()
    return found
