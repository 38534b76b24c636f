"""How close an encoder's embeddings stay to those of the model it was folded from."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ..calibration import body_of, is_padded_text, mask_of_frames, text_lengths
from ..checkpoint.modules import MODULES, read_modules, read_pooling
from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..corpus.samples import Sample, batches
from ..metrics.bootstrap import Units, mean_of
from .placement import place_batch
from .sharing import run_on_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 64
MAX_RANKED = 2000
"""Number of items whose similarities are ranked: two million pairs. Cosines are computed for all items."""

POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
"""Ways to make one embedding of the hidden states, and their names in the config of a sentence-transformers Pooling module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Mean and lowest cosine of each embedding to the reference's. `rank_correlation` is Spearman's, between the similarities
    (cosines) of all pairs of items by the model and by the reference; NaN for fewer than three items.
    """

    num_items: int
    pooling: str
    cosine: float
    worst_cosine: float
    rank_correlation: float
    seconds: float


def evaluate_embedding(
    model: "PreTrainedModel",
    sample: Sample | Iterable[Sample],
    reference: "PreTrainedModel | None" = None,
    *,
    pooling: str = "mean",
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> Embedding:
    """Compare the embeddings of an open model with those of its reference, on one sample or on several that are read as needed.

    `pooling` is "mean" (over the attention mask), "cls" (the first token) or "max"; "projected" is for a model with one tower for
    texts and one for images and takes the embeddings it compares, with texts and images as separate items.

    Raises:
        UserError: there is no reference, its embeddings have another size, or the pooling is unknown.
    """
    start = time.perf_counter()
    ours, theirs = _both(model, sample, reference, pooling, batch_size, progress)
    cosines = (ours * theirs).sum(1)
    return Embedding(
        num_items=len(ours),
        pooling=pooling,
        cosine=cosines.mean().item(),
        worst_cosine=cosines.min().item(),
        rank_correlation=rank_correlation(_similarities(ours), _similarities(theirs)),
        seconds=time.perf_counter() - start,
    )


def cosines_per_item(
    model: "PreTrainedModel",
    sample: Sample | Iterable[Sample],
    reference: "PreTrainedModel | None" = None,
    *,
    pooling: str = "mean",
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> list[Units]:
    """Return the cosine of every item's embedding to the reference's, whose mean `evaluate_embedding` returns.

    Raises:
        UserError: as `evaluate_embedding`.
    """
    ours, theirs = _both(model, sample, reference, pooling, batch_size, progress)
    return [mean_of("cosine", "items", (ours * theirs).sum(1).numpy())]


def _both(
    model: "PreTrainedModel",
    sample: Sample | Iterable[Sample],
    reference: "PreTrainedModel | None",
    pooling: str,
    batch_size: int,
    progress: Progress,
) -> tuple[Float[Tensor, "item model"], Float[Tensor, "item model"]]:
    """Return the unit vectors of the model and of its reference."""
    if reference is None:
        raise UserError(
            "an encoder has no loss, so its embeddings are compared with the original's: give --reference ORIGINAL"
        )

    def both(batch: Sample) -> tuple[Tensor, Tensor]:
        return embed(model, batch, pooling=pooling), embed(reference, batch, pooling=pooling)

    places: Tensor | None = None
    if isinstance(sample, dict) and is_padded_text(sample):
        order = text_lengths(sample).argsort()  # texts of about the same length have little padding together
        sample, places = {name: tensor[order] for name, tensor in sample.items()}, order.argsort()
    found = run_on_items(sample, batch_size, both, progress, "embed")
    ours, theirs = (normalize(torch.cat(one), dim=1) for one in zip(*found, strict=True))
    if places is not None:
        ours, theirs = ours[places], theirs[places]
    if ours.shape != theirs.shape:
        raise UserError(f"expected embeddings of the reference's size {theirs.shape[1]}, got {ours.shape[1]}")
    return ours, theirs


@torch.no_grad()
def embed(
    model: "PreTrainedModel", sample: Sample, *, pooling: str = "mean", batch_size: int = BATCH_SIZE
) -> Float[Tensor, "item model"]:
    """Return one embedding per item, in float64, made of the last hidden states of the model without its head.

    Raises:
        UserError: an unknown pooling.
    """
    inputs = {name: tensor for name, tensor in sample.items() if name != "labels"}
    if pooling == "projected":
        outputs = [model(**place_batch(batch, model)) for batch in batches(inputs, batch_size)]
        return torch.cat([o[name].cpu().double() for name in ("text_embeds", "image_embeds") for o in outputs])
    pooled = []
    for batch in batches(inputs, batch_size):
        states = body_of(model, batch)(**place_batch(batch, model)).last_hidden_state.cpu().double()
        mask = batch.get("attention_mask")
        if mask is not None and "input_values" in batch:
            mask = mask_of_frames(mask, states.shape[1])
        pooled.append(_pooled(states, mask, pooling))
    return torch.cat(pooled)


def _pooled(
    states: Float[Tensor, "item token model"], mask: Int[Tensor, "item token"] | None, pooling: str
) -> Float[Tensor, "item model"]:
    is_real = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask != 0
    if pooling == "mean":
        return (states * is_real[..., None]).sum(1) / is_real.sum(1, keepdim=True).clamp(min=1)
    if pooling == "max":
        return states.masked_fill(~is_real[..., None], -torch.inf).amax(1)
    if pooling == "cls":
        return states[torch.arange(len(states)), is_real.int().argmax(1)]
    raise UserError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")


def pooling_of(path: Path) -> str | None:
    """Return the pooling that a sentence-transformers directory specifies; None where it is no such directory.

    Modules after the pooling (a dense layer) are ignored, as they are the same in model and reference.

    Raises:
        UserError: the pooling is not supported, or there are several.
    """
    if not (path / MODULES).is_file():
        return None
    folder = next((module.directory for module in read_modules(path) if module.kind.endswith("Pooling")), None)
    if folder is None:
        return None
    file = path / folder / "config.json"
    config = read_pooling(file)
    named = config.get("pooling_mode")
    if isinstance(named, str) and named in POOLINGS:
        return named
    enabled = [key for key, flag in config.items() if key.startswith("pooling_mode_") and flag is True]
    found = [name for name, key in POOLINGS.items() if enabled == [key]]
    if not found:
        raise UserError(f"{file}: asks for {', '.join(enabled) or 'no pooling'}; expected one of {', '.join(POOLINGS)}")
    return found[0]


def _similarities(embeddings: Float[Tensor, "item model"]) -> Float[Tensor, " pair"]:
    """Return the cosines of all pairs among the first `MAX_RANKED` unit vectors."""
    some = embeddings[:MAX_RANKED]
    first, second = torch.triu_indices(len(some), len(some), 1)
    return (some @ some.T)[first, second]


def rank_correlation(ours: Float[Tensor, " pair"], theirs: Float[Tensor, " pair"]) -> float:
    """Return Spearman's rank correlation, with mean ranks for ties; NaN where one side is constant."""
    from scipy.stats import rankdata

    a, b = (torch.from_numpy(rankdata(values.numpy())) for values in (ours, theirs))
    a, b = a - a.mean(), b - b.mean()
    scale = (a @ a * (b @ b)).sqrt()
    return (a @ b / scale).item() if scale > 0 else float("nan")
