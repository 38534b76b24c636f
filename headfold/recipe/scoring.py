"""Measure a checkpoint on data of its own kind, alone or beside the one it was folded from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.hub import resolve
from ..core.errors import UserError, suggest
from ..corpus.pairs import read_pairs
from ..corpus.samples import Sample, draw_sample, image_sample_blocks, kind_of
from ..evaluate import classification, embedding, perplexity, translation
from ..hf_models import open_model, open_tokenizer, stored_dtype
from ..runtime.load import own_class
from .measuring import default_device
from .source import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measured = translation.Translation | classification.Classification | embedding.Embedding
MAX_CONTEXT = 512
"""Tokens at which texts that are no language model's windows are cut, where the model itself takes more."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What was measured, with what, on what. `kind` is what the model takes (`corpus.samples.kind_of`)."""

    kind: str
    model: str
    reference: str | None
    source: str
    dtype: str
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        return facts | facts.pop("measured")


@dataclass(frozen=True, slots=True)
class Subject:
    """Open models and options of one evaluation of what is no language model."""

    directory: Path
    config: Mapping[str, Any]
    model: "PreTrainedModel"
    reference: "PreTrainedModel | None"
    reference_directory: Path | None
    source: str
    columns: Sequence[str]
    context: int
    limit: int | None
    metric: str
    beams: int
    max_new_tokens: int


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | None = None,
    metric: str | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    beams: int = 1,
    max_new_tokens: int = translation.MAX_NEW_TOKENS,
    limit: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> perplexity.Evaluation | Scores:
    """Measure `model` by what it takes and gives, and beside `reference` where one is named.

    A causal language model: perplexity on `text` (default: the bundled held-out text), KL and top-1 agreement; `limit` counts
    tokens. An encoder-decoder: loss per target token of pairs of text, and `metric` ("bleu", the default, or "rouge") of what it writes,
    greedily or with `beams` and cut at `max_new_tokens`. A classifier: accuracy and cross-entropy of labelled images or sentences. Any
    other encoder: cosines and rank correlation of its embeddings to the reference's, which it needs. There `text` is what
    `headfold.corpus.samples` reads, `columns` its columns and `limit` a number of items: the first of the source, but images are drawn
    from the whole of it, since files tend to be sorted by class.

    Raises:
        UserError: a checkpoint or source that cannot be read, or one of another kind than the model's.
    """
    progress, device = progress or silent, device or default_device()
    directory = resolve(str(model))
    other = None if reference is None else resolve(str(reference))
    config = json.loads((directory / "config.json").read_text())
    kind = kind_of(config)
    check_metric(metric, kind, model)
    progress("evaluate", 0, 1)
    if kind == "text":
        found = perplexity.evaluate_perplexity(directory, other, text, context=context, max_tokens=limit, device=device)
        progress("evaluate", 1, 1)
        return found
    options = {"columns": columns, "context": context, "limit": limit}
    writing = {"metric": metric, "beams": beams, "max_new_tokens": max_new_tokens}
    opened = open_subject(directory, other, text, device, **options, **writing)
    measured = _MEASURES[kind](opened)
    progress("evaluate", 1, 1)
    name = None if reference is None else str(reference)
    return Scores(kind, str(model), name, text, dtype_name(opened.model), measured)


def facts(found: perplexity.Evaluation | Scores) -> dict[str, Any]:
    """The machines' form."""
    if isinstance(found, Scores):
        return found.to_json()
    return {**asdict(found), "perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity}


def check_metric(metric: str | None, kind: str, model: str | Path) -> None:
    """Refuse a measure of outputs that is not known, or of a model that writes none.

    Raises:
        UserError: as said.
    """
    if metric is not None and metric not in translation.METRICS:
        raise UserError(f"--metric {metric}: {suggest(metric, translation.METRICS)}")
    if metric is not None and kind != "pairs":
        raise UserError(
            f"--metric {metric}: expected an encoder-decoder of pairs of text, got {model}, a model of {kind}; leave it out"
        )


def check_text(text: str | None, kind: str, model: str | Path) -> None:
    """Refuse to measure on nothing: of data other than plain text none is bundled.

    Raises:
        UserError: as said.
    """
    if text is None and kind != "text":
        raise UserError(f"{model}: a model of {kind} is measured on data that you name; give --text SOURCE")


def open_subject(
    directory: Path,
    reference: Path | None,
    text: str | None,
    device: str,
    *,
    metric: str | None,
    columns: Sequence[str],
    context: int | None,
    limit: int | None,
    beams: int,
    max_new_tokens: int,
) -> Subject:
    """Models opened in their checkpoint's dtype, float32 at least.

    Raises:
        UserError: a checkpoint that does not open, or no `text`.
    """
    config = json.loads((directory / "config.json").read_text())
    check_text(text, kind_of(config), directory)
    dtype = torch.promote_types(stored_dtype(directory), torch.float32)
    return Subject(
        directory=directory,
        config=config,
        model=open_own(directory, dtype, device),
        reference=None if reference is None else open_own(reference, dtype, device),
        reference_directory=reference,
        source=text,
        columns=columns,
        context=context or _context(directory, config),
        limit=limit,
        metric=metric or "bleu",
        beams=beams,
        max_new_tokens=max_new_tokens,
    )


def open_own(directory: Path, dtype: torch.dtype, device: str) -> "PreTrainedModel":
    """With a class of our own where the checkpoint needs it, else by stock transformers.

    Raises:
        UserError: as `hf_models.open_model`.
    """
    config = json.loads((directory / "config.json").read_text())
    return open_model(directory, dtype=dtype, device=device, model_class=own_class(config))


def dtype_name(model: "PreTrainedModel") -> str:
    return str(model.dtype).removeprefix("torch.")


def _context(directory: Path, config: Mapping[str, Any]) -> int:
    """Tokens that a text may have: what the config and sentence-transformers allow, at most `MAX_CONTEXT`."""
    fields = ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions")
    parts = (config, config.get("text_config") or {})
    limits = [part[field] for part in parts for field in fields if isinstance(part.get(field), int)]
    file = directory / "sentence_bert_config.json"
    limits += [json.loads(file.read_text()).get("max_seq_length") or MAX_CONTEXT] if file.is_file() else []
    # roberta counts its positions from pad_token_id + 1, so that many fewer tokens fit.
    offset = config.get("pad_token_id", 0) + 1 if "roberta" in str(config.get("model_type")) else 0
    return min([MAX_CONTEXT, *(limit - offset for limit in limits)])


def _pairs(opened: Subject) -> translation.Translation:
    pairs = read_pairs(opened.source, opened.columns, opened.limit)
    tokenizer = open_tokenizer(opened.directory)
    return translation.evaluate_translation(
        opened.model,
        pairs,
        tokenizer,
        reference=opened.reference,
        metric=opened.metric,
        context=opened.context,
        beams=opened.beams,
        max_new_tokens=opened.max_new_tokens,
    )


def _audio(opened: Subject) -> translation.Translation:
    sample = sample_of("audio", opened)
    if "labels" not in sample:
        raise UserError(
            f"{opened.source}: expected a transcript of every item, found none; name it with --columns AUDIO,TEXT"
        )
    nll, num_tokens = translation.target_nll(opened.model, sample)
    beside = None if opened.reference is None else translation.target_nll(opened.reference, sample)[0]
    return translation.Translation(
        num_items=len(sample["labels"]),
        num_tokens=num_tokens,
        nll=nll,
        beams=1,
        seconds=0.0,
        reference_nll=beside,
    )


def image_blocks(opened: Subject) -> Iterator[Sample]:
    """The first items, or as many drawn from the whole source: files tend to be sorted by class."""
    seed = None if opened.limit is None else 0
    return image_sample_blocks(
        opened.source, path=opened.directory, num_items=opened.limit, seed=seed, columns=opened.columns
    )


def _images(opened: Subject) -> classification.Classification | embedding.Embedding:
    if classifies(opened):
        return classification.evaluate_classification(opened.model, image_blocks(opened), reference=opened.reference)
    return embedding.evaluate_embedding(opened.model, image_blocks(opened), opened.reference, pooling="cls")


def _sentences(opened: Subject) -> classification.Classification | embedding.Embedding:
    sample = sample_of("sentences", opened)
    if classifies(opened) and "labels" in sample:
        return classification.evaluate_classification(opened.model, sample, reference=opened.reference)
    return embedding.evaluate_embedding(opened.model, sample, opened.reference, pooling=pooling_of(opened))


def pooling_of(opened: Subject) -> str:
    """The reference's own pooling counts: a fold is to stand in for it."""
    directories = [path for path in (opened.reference_directory, opened.directory) if path is not None]
    return next(filter(None, map(embedding.pooling_of, directories)), "mean")


def sample_of(kind: str, opened: Subject) -> Sample:
    """The whole source, or its first items."""
    return draw_sample(
        kind,
        opened.source,
        path=opened.directory,
        num_items=opened.limit,
        context=opened.context,
        seed=None,
        columns=opened.columns,
    )


def classifies(opened: Subject) -> bool:
    """Whether its head names a class of an item."""
    heads = opened.config.get("architectures") or [""]
    return heads[0].removeprefix("Grouped").endswith(("ForImageClassification", "ForSequenceClassification"))


def _captions(opened: Subject) -> embedding.Embedding:
    """Embeddings of both towers."""
    return embedding.evaluate_embedding(opened.model, sample_of("captions", opened), opened.reference, pooling="projected")


_MEASURES = {"captions": _captions, "pairs": _pairs, "audio": _audio, "images": _images, "sentences": _sentences}
