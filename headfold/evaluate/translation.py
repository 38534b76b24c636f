"""Loss of an encoder-decoder on given outputs (teacher-forced), and the quality of the outputs that it generates (BLEU, ROUGE)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..corpus.pairs import IGNORED, encode_pairs, language_token
from ..corpus.samples import Sample
from ..families.context import context_length
from ..hf_models import quiet
from ..metrics import bleu, rouge
from ..metrics.bootstrap import Units
from .placement import place_batch
from .sharing import run_on_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 64
MAX_NEW_TOKENS = 128


METRICS = {"bleu": bleu, "rouge": rouge}
"""Metrics of generated outputs: pages with `require()` and `units(hypotheses, targets)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """`nll` is in nats per target token, teacher-forced; `kl` is the mean KL(reference ‖ model) per target token.

    `bleu` is sacrebleu's corpus BLEU (13a), the four of rouge-score are mean F1, all in percent; `wer`, of speech, is the share of wrong
    words (`metrics.words`). They are None where another metric was asked for or nothing was generated.
    """

    num_items: int
    num_tokens: int
    nll: float
    bleu: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rougeL: float | None = None
    rougeLsum: float | None = None
    wer: float | None = None
    normaliser: str | None = None
    """How words were made alike before they were compared: `english` or `basic` (`metrics.words.normaliser_of`)."""
    beams: int
    seconds: float
    reference_nll: float | None = None
    reference_bleu: float | None = None
    reference_rouge1: float | None = None
    reference_rouge2: float | None = None
    reference_rougeL: float | None = None
    reference_rougeLsum: float | None = None
    reference_wer: float | None = None
    wer_to_reference: float | None = None
    """The same against what the reference writes."""
    kl: float | None = None


def evaluate_translation(
    model: "PreTrainedModel",
    pairs: Sequence[tuple[str, str]],
    tokenizer: Any,
    *,
    reference: "PreTrainedModel | None" = None,
    metric: str = "bleu",
    context: int = 512,
    batch_size: int = BATCH_SIZE,
    beams: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = no_progress,
) -> Translation:
    """Measure an open model on pairs of (input, expected output), and its reference too; for the models both sides are cut at
    `context` tokens.

    Generated outputs are measured by `metric`, one of `METRICS`. With `max_new_tokens=0` nothing is generated, which takes most of
    the time.

    Raises:
        UserError: the metric's package is not installed, or the model has no language-model head.
    """
    start = time.perf_counter()
    scores = partial(
        scores_per_pair, pairs=pairs, tokenizer=tokenizer, metric=metric, context=context, batch_size=batch_size,
        beams=beams, max_new_tokens=max_new_tokens, progress=progress,
    )  # fmt: skip
    own = scores(model, reference=reference)
    other = [] if reference is None else scores(reference)
    beside = {f"reference_{units.metric}": units.total for units in other}
    totals = {units.metric: units.total for units in own}
    num_tokens, seconds = int(own[0].sums[:, 1].sum()), time.perf_counter() - start
    return Translation(
        num_items=len(pairs), num_tokens=num_tokens, beams=beams, seconds=seconds, normaliser=None, **totals, **beside
    )


def scores_per_pair(
    model: "PreTrainedModel",
    pairs: Sequence[tuple[str, str]],
    tokenizer: Any,
    *,
    reference: "PreTrainedModel | None" = None,
    metric: str = "bleu",
    context: int = 512,
    batch_size: int = BATCH_SIZE,
    beams: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = no_progress,
) -> list[Units]:
    """Return the model's figures of `evaluate_translation` pair by pair: the loss, KL beside a reference, and `metric` of its outputs.

    Raises:
        UserError: as `evaluate_translation`.
    """
    if max_new_tokens:
        METRICS[metric].require()  # before hours of writing
    sample = encode_pairs(pairs, tokenizer, context)
    found = [per_token("nll", "pairs", target_losses(model, sample, batch_size=batch_size, progress=progress))]
    if reference is not None:
        divergences = target_divergences(model, reference, sample, batch_size=batch_size, progress=progress)
        found.append(per_token("kl", "pairs", divergences))
    if max_new_tokens:
        outputs = generate_texts(
            model,
            sample,
            tokenizer,
            beams=beams,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        found += METRICS[metric].units(outputs, [target for _, target in pairs])
    return found


def per_token(metric: str, unit: str, sums: Float[Tensor, "item 2"]) -> Units:
    """Return a mean over tokens, from its sum and their number in each item."""
    return Units(metric=metric, unit=unit, sums=sums.numpy(), lower_is_better=True)


@torch.no_grad()
def target_divergences(
    model: "PreTrainedModel",
    reference: "PreTrainedModel",
    sample: Sample,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> Float[Tensor, "item 2"]:
    """Return, per item in the sample's order, KL(reference ‖ model) in nats summed over the labels that are not padding, and their
    number.
    """

    def divergences(batch: Sample) -> Float[Tensor, "item 2"]:
        kept = batch["labels"] != IGNORED
        expected, found = (
            log_softmax(one(**place_batch(batch, one), use_cache=False).logits.cpu()[kept].float(), -1)
            for one in (reference, model)
        )
        per_label = torch.zeros(kept.shape, dtype=torch.float64)
        per_label[kept] = kl_div(found, expected, reduction="none", log_target=True).sum(-1).double()
        return torch.stack([per_label.sum(1), kept.double().sum(1)], 1)

    order = _by_length(sample)
    rows = run_on_items(_reordered(sample, order), batch_size, divergences, progress, "divergences")
    return torch.cat(rows)[order.argsort()]


def target_kl(
    model: "PreTrainedModel", reference: "PreTrainedModel", sample: Sample, *, batch_size: int = BATCH_SIZE
) -> float:
    """Return the mean KL(reference ‖ model) per label that is not padding, in nats, teacher-forced."""
    total, count = target_divergences(model, reference, sample, batch_size=batch_size).sum(0).tolist()
    return total / count


@torch.no_grad()
def target_losses(
    model: "PreTrainedModel", sample: Sample, *, batch_size: int = BATCH_SIZE, progress: Progress = no_progress
) -> Float[Tensor, "item 2"]:
    """Return, per item in the sample's order, the loss in nats summed over the labels that are not padding, and their number;
    teacher-forced.

    Items of similar length run together. Log-probabilities are computed in float32 (float64 for float64 logits) and summed in float64.

    Raises:
        UserError: the model gives no logits.
    """

    def losses(batch: Sample) -> Float[Tensor, "item 2"]:
        output = model(**place_batch(batch, model), use_cache=False)
        if "logits" not in output:
            raise UserError(
                f"{type(model).__name__}: expected a language-model head, found none; name a class that has one in config.json"
            )
        logits, labels = output.logits, batch["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        found = cross_entropy(logits, labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="none")
        per_label = found.cpu().double().view(labels.shape)
        return torch.stack([per_label.sum(1), (labels != IGNORED).double().sum(1)], 1)

    order = _by_length(sample)
    rows = run_on_items(_reordered(sample, order), batch_size, losses, progress, "losses")
    return torch.cat(rows)[order.argsort()]


def target_nll(
    model: "PreTrainedModel", sample: Sample, *, batch_size: int = BATCH_SIZE, progress: Progress = no_progress
) -> tuple[float, int]:
    """Return the mean loss per label that is not padding, in nats, teacher-forced, and the number of these labels.

    Raises:
        UserError: the model gives no logits.
    """
    total, count = target_losses(model, sample, batch_size=batch_size, progress=progress).sum(0).tolist()
    return total / count, int(count)


@torch.no_grad()
def generate_texts(
    model: "PreTrainedModel",
    sample: Sample,
    tokenizer: Any,
    *,
    beams: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> list[str]:
    """Return the text that the model generates for each item, greedily or by beam search, in the sample's order, without special tokens.

    Other settings of its generation config (forced tokens, length penalty) apply; a model of several languages begins with the token of
    the tokenizer's target language. Items of similar length run together.
    """
    inputs = {name: tensor for name, tensor in sample.items() if name != "labels"}
    order, max_new_tokens = _by_length(inputs), _fitting(max_new_tokens, model)
    language, config = language_token(tokenizer), cast(Any, model.generation_config)
    # mBART for one language has the token of that language before the first position already.
    forced = {} if language in (None, config.decoder_start_token_id) else {"forced_bos_token_id": language}

    def generate(batch: Sample) -> list[str]:
        with quiet():
            ids = cast(Any, model).generate(
                **place_batch(batch, model), num_beams=beams, do_sample=False, max_new_tokens=max_new_tokens, **forced
            )
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    batches_of_texts = run_on_items(_reordered(inputs, order), batch_size, generate, progress, "generate")
    texts = [text for part in batches_of_texts for text in part]
    return [texts[place] for place in order.argsort().tolist()]


def _fitting(num_tokens: int, model: "PreTrainedModel") -> int:
    """Return the number of new tokens, limited to the positions of the decoder where these are learned."""
    limit = context_length(model.config.to_dict())
    return num_tokens if limit is None else min(num_tokens, limit - 1)


def _by_length(sample: Sample) -> Int[Tensor, " item"]:
    """Return the order of items by length, longest first, so that memory runs out at once or never; sounds, all of one length, keep
    their order.
    """
    mask = sample.get("attention_mask")
    lengths = torch.zeros(len(next(iter(sample.values())))) if mask is None else mask.sum(1)
    return lengths.argsort(descending=True, stable=True)


def _reordered(sample: Sample, order: Int[Tensor, " item"]) -> Sample:
    return {name: tensor[order] for name, tensor in sample.items()}
