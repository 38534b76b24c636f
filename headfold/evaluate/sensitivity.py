"""How much folding one site alone changes the model: the scale on which predicted errors of different layers become comparable."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration import Sample
from ..corpus.pairs import IGNORED
from ..corpus.samples import main_input
from ..parallel import falls_here, gathered_in_order
from .verify import model_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
"""Numbers of the first input that run at once."""


@contextmanager
def replaced_parameters(model: "PreTrainedModel", tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Return a context in which some parameters, by name, have other values."""
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
    """Measures how far a model, while it is changed, is from what it was when this object was made, on one sample.

    For models with logits this is the mean KL(original ‖ changed) per position, in nats; for others the squared error of the last hidden
    states as a share of their energy. Several processes share the batches.
    """

    def __init__(self, model: "PreTrainedModel", sample: Sample) -> None:
        """Run the model as it is now."""
        self._model = model
        first = main_input(sample)
        batch_size = max(1, BATCH_TOKENS // max(1, first[0].numel() if first.ndim == 2 else BATCH_TOKENS // 8))
        parts = {name: tensor.split(batch_size) for name, tensor in sample.items()}
        batches = [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]
        self._own = [
            (number, batch, *self._output(batch)) for number, batch in enumerate(batches) if falls_here(number)
        ]

    def __call__(self) -> float:
        """Return the divergence of the model as it is now."""
        found, count = 0.0, 0.0
        own = [(number, self._sums(batch, original, weight)) for number, batch, original, weight in self._own]
        for distance, weight in gathered_in_order(own):
            found, count = found + distance, count + weight
        return found / count

    def _sums(self, batch: Sample, original: Tensor, weight: Tensor) -> tuple[float, float]:
        """Return the sum of distances over the positions of a batch that count, and their number."""
        changed, _ = self._output(batch)
        return float((self._distance(original, changed) * weight).sum()), float(weight.sum())

    @torch.no_grad()
    def _output(self, batch: Sample) -> tuple[Tensor, Tensor]:
        """Return log-probabilities or states, (item, …, last), and which positions count."""
        name, output = model_output(self._model, batch)
        if name == "logits":
            output = output.float().log_softmax(-1)
        weight = torch.ones(output.shape[:-1])
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if labels is not None and labels.shape == weight.shape:
            weight = (labels != IGNORED).float()
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
    """Return the divergence of each change alone, by site and number of K/V heads.

    `changes` maps (site, K/V heads) to a function whose context manager changes the model while it is entered. `progress` is called with
    the name of the site before each change.
    """
    divergence = Divergence(model, sample)
    found: dict[str, dict[int, float]] = {}
    for (site, num_kv_heads), make in changes.items():
        progress(site)
        with make():
            found.setdefault(site, {})[num_kv_heads] = divergence()
    return found
