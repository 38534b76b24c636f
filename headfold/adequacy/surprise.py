"""How far a text is from what a language model would write: its loss on the text beside the loss that it expects itself.

On text that a model samples, its loss is on average the entropy of its predictions. On text that it does not know it is larger: the model
is sure of what does not come.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ..hf_models.streamed import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS, TOKENS = 4, 128
"""Windows of the calibration text that are looked at, and tokens of each: as many logits as those of a verification."""


@dataclass(frozen=True, slots=True)
class Surprise:
    """Means over the predicted tokens of a text, in nats."""

    nll: float
    entropy: float
    """Of the model's predictions: the loss that it expects."""

    @property
    def perplexity(self) -> float:
        return _exp(self.nll)

    @property
    def expected_perplexity(self) -> float:
        return _exp(self.entropy)

    @property
    def excess(self) -> float:
        """The loss beyond the expected one."""
        return self.nll - self.entropy

    def facts(self) -> dict[str, str]:
        """Return what files and cards record of it; nothing where the model has no finite loss."""
        if not math.isfinite(self.excess):
            return {}
        return {"perplexity": f"{self.perplexity:.4g}", "expected_perplexity": f"{self.expected_perplexity:.4g}"}


@torch.no_grad()
def surprise(
    model: "PreTrainedModel", windows: Int[Tensor, "window token"], num_windows: int = WINDOWS, num_tokens: int = TOKENS
) -> Surprise:
    """Return how a language model takes a sample of windows: the beginnings of some that lie evenly among all of them.

    Windows of one token predict nothing, so nothing is known of them: the means are NaN.
    """
    step = max(1, len(windows) // num_windows)
    some = windows[::step][:num_windows, :num_tokens]
    logits = model(input_ids=some.to(input_device(model)), use_cache=False).logits[:, :-1]
    nll, entropy, count = 0.0, 0.0, some[:, 1:].numel()
    for predicted, targets in zip(logits, some[:, 1:].to(logits.device), strict=True):
        logs = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).log_softmax(-1)
        nll -= float(logs.gather(1, targets[:, None]).sum(dtype=torch.float64))
        entropy -= float((logs.exp() * logs).nan_to_num().sum(dtype=torch.float64))
    return Surprise(nll / count, entropy / count) if count else Surprise(math.nan, math.nan)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < math.log(1e300) else math.inf
