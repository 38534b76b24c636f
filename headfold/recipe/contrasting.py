"""Several models on the same data: what each reaches, and whether its difference to the first is more than chance."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.hub import resolve
from ..core.errors import UserError
from ..corpus.pairs import read_pairs
from ..corpus.samples import kind_of
from ..evaluate import classification, embedding, perplexity, translation
from ..evaluate.bootstrap import LEVEL, RESAMPLES, Difference, Resampled, differences
from ..evaluate.perplexity import open_language_model
from ..hf_models import compute_dtype, open_tokenizer, stored_dtype
from ..runtime.load import own_class
from .measuring import default_device
from .scoring import Subject, check_metric, classifies, image_blocks, open_subject, pooling_of, sample_of
from .source import Progress, silent

FEW = 20
"""Units below which percentile intervals are noticeably too narrow (by a tenth at 20, for a mean of normal values)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one model; what is said of the difference is None for the first model."""

    model: str
    metric: str
    value: float
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    verdict: str | None
    """better, worse, or not distinguishable: the interval holds zero."""
    lower_is_better: bool
    units: str
    num_units: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """All rows, and how their intervals were drawn."""

    source: str
    resamples: int
    seed: int
    rows: list[Row]
    level: float = LEVEL
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> list[dict[str, Any]]:
        drawn = {"source": self.source, "resamples": self.resamples, "seed": self.seed, "level": self.level}
        return [{**asdict(row), **drawn} for row in self.rows]


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be measured on what."""

    directories: Sequence[Path]
    reference: Path | None
    text: str | None
    context: int | None
    limit: int | None
    device: str
    progress: Progress
    options: dict[str, Any]


def contrast(
    models: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    text: str | None = None,
    metric: str | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    beams: int = 1,
    max_new_tokens: int = translation.MAX_NEW_TOKENS,
    limit: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Contrast:
    """Measure every model as `recipe.evaluate` does, on the same data, and the others' differences to the first.

    Intervals are of 95 %, by a paired bootstrap (`evaluate.bootstrap.differences`) over windows of text, pairs, or items. Models are
    opened one at a time. Beside a `reference`, which encoders without a classifier need, KL and agreement with it are compared as well.

    Raises:
        UserError: fewer than two models or two units; models of several kinds; language models whose tokenizers differ, so that their
            losses are not of the same tokens; and whatever `recipe.evaluate` refuses.
    """
    check_several(models)
    directories = [resolve(str(model)) for model in models]
    kind = _one_kind(models, directories)
    check_metric(metric, kind, models[0])
    request = _Request(
        directories,
        None if reference is None else resolve(str(reference)),
        text,
        context,
        limit,
        device or default_device(),
        progress or silent,
        {"metric": metric, "columns": columns, "beams": beams, "max_new_tokens": max_new_tokens},
    )
    notes: list[str] = []
    source, measured = _language_models(request) if kind == "text" else _others(kind, request, notes)
    return contrasted(models, measured, source, resamples, seed, notes)


def check_several(models: Sequence[str | Path]) -> None:
    """Refuse to compare fewer than two models.

    Raises:
        UserError: as said.
    """
    if len(models) < 2:
        raise UserError(
            f"--compare: expected at least two models, got {len(models)}; name what the first stands beside"
        )


def contrasted(
    models: Sequence[str | Path],
    measured: Sequence[Sequence[Resampled]],
    source: str,
    resamples: int,
    seed: int,
    notes: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> Contrast:
    """Rows, metric by metric, of what was measured of each model: the same metrics of the same units, called `labels` if not by name.

    Raises:
        UserError: fewer than two units.
    """
    rows: list[Row] = []
    for label, units in zip(labels or [one.metric for one in measured[0]], zip(*measured, strict=True), strict=True):
        beside = [None, *differences(units, resamples=resamples, seed=seed)]
        rows += [_row(str(model), label, *pair) for model, *pair in zip(models, units, beside, strict=True)]
    fewest = min(rows, key=lambda row: row.num_units)
    few = f"intervals from {fewest.num_units} {fewest.units} are too narrow; give more data"
    return Contrast(source, resamples, seed, rows, notes=[*notes, *([few] if fewest.num_units < FEW else [])])


def _row(model: str, metric: str, units: Resampled, beside: Difference | None) -> Row:
    facts = (units.lower_is_better, units.unit, len(units))
    if beside is None:
        return Row(model, metric, units.total, None, None, None, None, None, *facts)
    better = "better" if (beside.value < 0) == units.lower_is_better else "worse"
    verdict = better if beside.is_distinguishable else "not distinguishable"
    return Row(model, metric, units.total, beside.value, beside.low, beside.high, beside.p, verdict, *facts)


def _one_kind(models: Sequence[str | Path], directories: Sequence[Path]) -> str:
    kinds = [kind_of(json.loads((directory / "config.json").read_text())) for directory in directories]
    for model, kind in zip(models, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{model}: a model of {kind}, {models[0]} one of {kinds[0]}; compare models that are measured on the same data"
            )
    return kinds[0]


def _language_models(request: _Request) -> tuple[str, list[Sequence[Resampled]]]:
    """The same windows through each: of the shortest context among them."""
    first, *others = request.directories
    dtypes = [compute_dtype(stored_dtype(path), request.device)[0] for path in request.directories]
    dtype, (source, tokens) = (
        reduce(torch.promote_types, dtypes),
        perplexity.read_tokens(first, request.text, request.limit),
    )
    for other in (*others, *([] if request.reference is None else [request.reference])):
        _check_tokens(first, other, tokens, request)
    context = request.context or min(map(_context, request.directories))
    windows = perplexity.split_windows(tokens, context)
    reference = None if request.reference is None else open_language_model(request.reference, dtype, request.device)
    measured = []
    for number, directory in enumerate(request.directories):
        request.progress("models", number, len(request.directories))
        model = open_language_model(directory, dtype, request.device)
        measured.append(perplexity.losses_per_window(model, reference, windows))
    request.progress("models", len(measured), len(measured))
    return f"{source}, context {context}", measured


def _context(directory: Path) -> int:
    from transformers import AutoConfig

    own_class(json.loads((directory / "config.json").read_text()))  # makes its config known, where that is ours
    return perplexity.default_context(
        AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    )


def _check_tokens(first: Path, other: Path, tokens: torch.Tensor, request: _Request) -> None:
    """Losses per token compare only where the text is the same tokens."""
    _, found = perplexity.read_tokens(other, request.text, request.limit)
    if not torch.equal(found, tokens):
        raise UserError(
            f"{other}: splits the text into other tokens than {first}, and losses per token of two "
            "vocabularies do not compare; use models of one tokenizer, or --task"
        )


def _others(kind: str, request: _Request, notes: list[str]) -> tuple[str, list[Sequence[Resampled]]]:
    if kind not in _MEASURES:
        raise UserError(f"--compare: not for models of {kind}; run headfold eval on each")
    one_tokenizer = kind != "pairs" or _share_tokenizer(request)
    measured = []
    for number, directory in enumerate(request.directories):
        request.progress("models", number, len(request.directories))
        subject = open_subject(
            directory, request.reference, request.text, request.device, context=request.context, limit=request.limit, **request.options
        )  # fmt: skip
        measured.append([units for units in _MEASURES[kind](subject) if one_tokenizer or units.metric != "nll"])
    request.progress("models", len(measured), len(measured))
    if not one_tokenizer:
        notes.append("the models' tokenizers differ, so their losses per token do not compare and are left out")
    return str(request.text), measured


def _share_tokenizer(request: _Request) -> bool:
    """Whether losses per token compare; refused where nothing else was asked for, or a reference needs one vocabulary."""
    references = [] if request.reference is None else [request.reference]
    first, *others = (open_tokenizer(path).get_vocab() for path in (*request.directories, *references))
    same = all(other == first for other in others)
    if not same and (request.reference is not None or not request.options["max_new_tokens"]):
        raise UserError(
            "--compare: the models' tokenizers differ, and neither loss nor KL per token of two vocabularies compare; "
            "leave --reference out and give --max-new-tokens, to compare what they write"
        )
    return same


def _pairs(subject: Subject) -> list[Resampled]:
    pairs, tokenizer = read_pairs(subject.source, subject.columns, subject.limit), open_tokenizer(subject.directory)
    options = {"beams": subject.beams, "max_new_tokens": subject.max_new_tokens, "metric": subject.metric}
    return translation.scores_per_pair(
        subject.model, pairs, tokenizer, context=subject.context, reference=subject.reference, **options
    )


def _images(subject: Subject) -> list[Resampled]:
    if classifies(subject):
        return classification.scores_per_item(subject.model, image_blocks(subject), reference=subject.reference)
    return embedding.cosines_per_item(subject.model, image_blocks(subject), subject.reference, pooling="cls")


def _sentences(subject: Subject) -> list[Resampled]:
    sample = sample_of("sentences", subject)
    if classifies(subject) and "labels" in sample:
        return classification.scores_per_item(subject.model, sample, reference=subject.reference)
    return embedding.cosines_per_item(subject.model, sample, subject.reference, pooling=pooling_of(subject))


def _captions(subject: Subject) -> list[Resampled]:
    return embedding.cosines_per_item(subject.model, sample_of("captions", subject), subject.reference, pooling="projected")


_MEASURES = {"pairs": _pairs, "images": _images, "sentences": _sentences, "captions": _captions}
