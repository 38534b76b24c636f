"""How well an encoder-decoder expects given outputs (teacher-forced), and how good the outputs are that it writes (BLEU)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ..core.errors import UserError
from ..corpus.pairs import IGNORED, encode_pairs
from ..corpus.samples import Sample, batches
from ..stock import quiet
from .placing import placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 64
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """`nll` is in nats per target token, teacher-forced; `bleu` is sacrebleu's corpus BLEU (13a), None where nothing was written;
    `kl` is the mean KL(reference || model) per target token."""

    num_items: int
    num_tokens: int
    nll: float
    bleu: float | None
    beams: int
    seconds: float
    reference_nll: float | None = None
    reference_bleu: float | None = None
    kl: float | None = None


def evaluate(
    model: "PreTrainedModel",
    pairs: Sequence[tuple[str, str]],
    tokenizer: Any,
    *,
    reference: "PreTrainedModel | None" = None,
    context: int = 512,
    batch_size: int = BATCH_SIZE,
    beams: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Translation:
    """Both measures of open models on pairs of (input, expected output), cut at `context` tokens a side for the model only.

    With `max_new_tokens=0` nothing is written, and there is no BLEU: that takes most of the time.

    Raises:
        UserError: sacrebleu is not installed, or the model has no language-model head.
    """
    start, sample = time.perf_counter(), encode_pairs(pairs, tokenizer, context)
    nll, num_tokens = target_nll(model, sample, batch_size=batch_size)
    targets = [target for _, target in pairs]

    def bleu(of: "PreTrainedModel") -> float | None:
        if max_new_tokens == 0:
            return None
        options = {"beams": beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        return corpus_bleu(written(of, sample, tokenizer, **options), targets)

    reached, beside = bleu(model), {}
    if reference is not None:
        beside["reference_nll"] = target_nll(reference, sample, batch_size=batch_size)[0]
        beside["reference_bleu"] = bleu(reference)
        beside["kl"] = target_kl(model, reference, sample, batch_size=batch_size)
    seconds = time.perf_counter() - start
    return Translation(
        num_items=len(pairs), num_tokens=num_tokens, nll=nll, bleu=reached, beams=beams, seconds=seconds, **beside
    )


@torch.no_grad()
def target_kl(
    model: "PreTrainedModel", reference: "PreTrainedModel", sample: Sample, *, batch_size: int = BATCH_SIZE
) -> float:
    """Mean KL(reference || model) per label that is not padding, in nats, teacher-forced."""
    total, count = 0.0, 0
    for batch in batches(_reordered(sample, _by_length(sample)), batch_size):
        kept = batch["labels"].flatten() != IGNORED
        expected, found = (
            log_softmax(logits.float().cpu().flatten(0, 1)[kept], -1)
            for logits in (one(**placed(batch, one), use_cache=False).logits for one in (reference, model))
        )
        total += kl_div(found, expected, reduction="sum", log_target=True).item()
        count += int(kept.sum())
    return total / count


@torch.no_grad()
def target_nll(model: "PreTrainedModel", sample: Sample, *, batch_size: int = BATCH_SIZE) -> tuple[float, int]:
    """Mean loss per label that is not padding, in nats, teacher-forced, and how many there are.

    Items of like length run together. Log-probabilities are taken in float32 (float64 for float64 logits), summed in float64.

    Raises:
        UserError: the model gives no logits.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches(_reordered(sample, _by_length(sample)), batch_size):
        output = model(**placed(batch, model), use_cache=False)
        if "logits" not in output:
            raise UserError(
                f"{type(model).__name__}: expected a language-model head, found none; name one in config.json"
            )
        logits, labels = output.logits, batch["labels"].flatten()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        losses = cross_entropy(logits, labels.to(logits.device), ignore_index=IGNORED, reduction="none")
        total += losses.double().sum().cpu()
        count += int((labels != IGNORED).sum())
    return total.item() / count, count


@torch.no_grad()
def written(
    model: "PreTrainedModel",
    sample: Sample,
    tokenizer: Any,
    *,
    beams: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """What the model writes for each item, greedily or with beams, in the sample's order, without special tokens.

    Whatever else its generation config says (forced tokens, length penalty) holds. Items of like length run together.
    """
    inputs = {name: tensor for name, tensor in sample.items() if name != "labels"}
    order, max_new_tokens = _by_length(inputs), _fitting(max_new_tokens, model)
    texts: list[str] = []
    for batch in batches(_reordered(inputs, order), batch_size):
        with quiet():
            ids = model.generate(
                **placed(batch, model), num_beams=beams, do_sample=False, max_new_tokens=max_new_tokens
            )
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [texts[place] for place in order.argsort().tolist()]


def corpus_bleu(hypotheses: Sequence[str], targets: Sequence[str]) -> float:
    """BLEU in percent, by sacrebleu with its defaults (13a tokenisation, exponential smoothing), one reference an item.

    Raises:
        UserError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError("BLEU needs sacrebleu; pip install 'headfold[translation]'") from error
    return sacrebleu.corpus_bleu(list(hypotheses), [list(targets)], force=True).score


def _fitting(num_tokens: int, model: "PreTrainedModel") -> int:
    """No more tokens after the first than the decoder has positions for, where it has learned ones."""
    fields = ("max_target_positions", "max_position_embeddings")
    limits = [getattr(model.config, field, None) for field in fields]
    return min([num_tokens, *(limit - 1 for limit in limits if isinstance(limit, int))])


def _by_length(sample: Sample) -> Int[Tensor, " item"]:
    """Longest first, so that memory runs out at once or never; sounds, all of one length, keep their order."""
    mask = sample.get("attention_mask")
    lengths = torch.zeros(len(next(iter(sample.values())))) if mask is None else mask.sum(1)
    return lengths.argsort(descending=True, stable=True)


def _reordered(sample: Sample, order: Int[Tensor, " item"]) -> Sample:
    return {name: tensor[order] for name, tensor in sample.items()}
