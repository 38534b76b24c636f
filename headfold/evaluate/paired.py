"""Paired comparison of several models on the same data: what each reaches, and whether its difference to the first is more than chance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.config import read_config
from ..core.errors import UserError
from ..core.progress import Progress
from ..corpus.samples import kind_of
from ..families.context import context_length
from ..hf_models import compute_dtype, open_tokenizer, stored_dtype
from ..metrics.bootstrap import LEVEL, Difference, Resampled, differences
from . import classification, embedding, perplexity, speech, translation
from .data import DataRequest, OpenedModels, check_metric
from .perplexity import open_language_model

FEW_UNITS = 20
"""Units below which percentile intervals are noticeably too narrow (by a tenth at 20, for a mean of normal values)."""


@dataclass(frozen=True, slots=True)
class PairedRow:
    """One metric of one model; the fields of the difference are None for the first model."""

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
class PairedComparison:
    """All rows, and how their intervals were drawn."""

    source: str
    resamples: int
    seed: int
    rows: list[PairedRow]
    level: float = LEVEL
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the machine-readable form, as --json prints it."""
        drawn = {"source": self.source, "resamples": self.resamples, "seed": self.seed, "level": self.level}
        return [{**asdict(row), **drawn} for row in self.rows]


def compare_on_data(
    models: Sequence[str | Path],
    directories: Sequence[Path],
    reference: Path | None,
    request: DataRequest,
    resamples: int,
    seed: int,
    progress: Progress,
) -> PairedComparison:
    """Measure every model on the same data, and the differences of the others to the first.

    Intervals are of 95 %, by a paired bootstrap (`bootstrap.differences`) over windows of text, pairs, or items. Models are opened one
    at a time. Beside a `reference`, which encoders without a classifier need, KL and agreement with it are compared as well.

    Raises:
        UserError: fewer than two models or two units; models of several kinds; language models whose tokenizers differ, so that their
            losses are not of the same tokens.
    """
    check_several(models)
    kind = _one_kind(models, directories)
    check_metric(request.metric, kind, models[0])
    notes: list[str] = []
    if kind == "text":
        source, measured = _language_models(directories, reference, request, progress)
    else:
        source, measured = _other_models(kind, directories, reference, request, progress, notes)
    return paired_comparison(models, measured, source, resamples, seed, notes)


def check_several(models: Sequence[str | Path]) -> None:
    """Refuse to compare fewer than two models.

    Raises:
        UserError: as said.
    """
    if len(models) < 2:
        raise UserError(f"--compare: expected at least two models, got {len(models)}; name the others after the first")


def paired_comparison(
    models: Sequence[str | Path],
    measured: Sequence[Sequence[Resampled]],
    source: str,
    resamples: int,
    seed: int,
    notes: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> PairedComparison:
    """Return rows, metric by metric, from what was measured of each model: the same metrics of the same units. `labels` name them anew.

    Raises:
        UserError: fewer than two units.
    """
    rows: list[PairedRow] = []
    for label, units in zip(labels or [one.metric for one in measured[0]], zip(*measured, strict=True), strict=True):
        found = [None, *differences(units, resamples=resamples, seed=seed)]
        rows += [_row(str(model), label, *pair) for model, *pair in zip(models, units, found, strict=True)]
    fewest = min(rows, key=lambda row: row.num_units)
    few = f"intervals from {fewest.num_units} {fewest.units} are too narrow; give more data"
    all_notes = [*notes, *([few] if fewest.num_units < FEW_UNITS else [])]
    return PairedComparison(source, resamples, seed, rows, notes=all_notes)


def _row(model: str, metric: str, units: Resampled, found: Difference | None) -> PairedRow:
    facts = (units.lower_is_better, units.unit, len(units))
    if found is None:
        return PairedRow(model, metric, units.total, None, None, None, None, None, *facts)
    better = "better" if (found.value < 0) == units.lower_is_better else "worse"
    verdict = better if found.is_distinguishable else "not distinguishable"
    return PairedRow(model, metric, units.total, found.value, found.low, found.high, found.p, verdict, *facts)


def _one_kind(models: Sequence[str | Path], directories: Sequence[Path]) -> str:
    kinds = [kind_of(_config(directory)) for directory in directories]
    for model, kind in zip(models, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{model}: expected a model of {kinds[0]} as {models[0]} is, got one of {kind}; compare models that are measured on the "
                "same data"
            )
    return kinds[0]


def _config(directory: Path) -> dict[str, Any]:
    return read_config(directory)


def _language_models(
    directories: Sequence[Path], reference_directory: Path | None, request: DataRequest, progress: Progress
) -> tuple[str, list[Sequence[Resampled]]]:
    """Run the same windows through each model; they have the shortest context among the models."""
    first, *others = directories
    dtypes = [compute_dtype(stored_dtype(path), request.device)[0] for path in directories]
    dtype = request.dtype or reduce(torch.promote_types, dtypes)
    read = perplexity.ReadText.of(first, request.source, request.limit)
    for other in (*others, *([] if reference_directory is None else [reference_directory])):
        _check_tokens(first, other, read, request)
    longest = perplexity.MAX_CONTEXT
    context = request.context or min(min(context_length(_config(path)) or longest, longest) for path in directories)
    windows = read.windows(context)
    reference = None if reference_directory is None else open_language_model(reference_directory, dtype, request.device)
    measured: list[Sequence[Resampled]] = []
    for number, directory in enumerate(directories, 1):
        model = open_language_model(directory, dtype, request.device)
        measured.append(perplexity.losses_per_window(model, reference, windows, progress=_of_model(progress, number)))
    return f"{read.name}, context {context}", measured


def _of_model(progress: Progress, number: int) -> Progress:
    """Return a progress whose stages name the model, counted from 1."""
    return lambda stage, done, total: progress(f"{stage} {number}", done, total)


def _check_tokens(first: Path, other: Path, read: perplexity.ReadText, request: DataRequest) -> None:
    """Refuse models that split the text into different tokens: their losses per token do not compare."""
    found = perplexity.ReadText.of(other, request.source, request.limit)
    if read.tokens is not None and found.tokens is not None and not torch.equal(found.tokens, read.tokens):
        raise UserError(
            f"{other}: expected the tokens of {first}, got others: losses per token of two vocabularies do not compare; use models of "
            "one tokenizer, or --task"
        )


def _other_models(
    kind: str,
    directories: Sequence[Path],
    reference: Path | None,
    request: DataRequest,
    progress: Progress,
    notes: list[str],
) -> tuple[str, list[Sequence[Resampled]]]:
    one_tokenizer = kind not in ("pairs", "audio") or _share_tokenizer(directories, reference, request)
    measured: list[Sequence[Resampled]] = []
    for number, directory in enumerate(directories, 1):
        opened = OpenedModels.of(directory, reference, request, _of_model(progress, number))
        measured.append([units for units in _MEASURES[kind](opened) if one_tokenizer or units.metric != "nll"])
    notes += opened.notes(kind)
    if not one_tokenizer:
        notes.append("the models' tokenizers differ, so their losses per token do not compare and are left out")
    return str(request.source), measured


def _share_tokenizer(directories: Sequence[Path], reference: Path | None, request: DataRequest) -> bool:
    """Return whether losses per token compare.

    Raises:
        UserError: they do not, and nothing else was asked for, or a reference needs one vocabulary.
    """
    references = [] if reference is None else [reference]
    first, *others = (open_tokenizer(path).get_vocab() for path in (*directories, *references))
    same = all(other == first for other in others)
    if not same and (reference is not None or request.max_new_tokens == 0):
        raise UserError(
            "--compare: expected models of one tokenizer, got several: neither loss nor KL per token of two vocabularies compare; "
            "leave --reference out and give --max-new-tokens, to compare what they write"
        )
    return same


def _pairs(opened: OpenedModels) -> Sequence[Resampled]:
    pairs, tokenizer, how = opened.pairs()
    return translation.scores_per_pair(opened.model, pairs, tokenizer, **how)


def _audio(opened: OpenedModels) -> Sequence[Resampled]:
    sample, how = opened.recordings()
    return speech.scores_per_recording(opened.model, sample, opened.directory, **how)


def _images(opened: OpenedModels) -> Sequence[Resampled]:
    if opened.classifies:
        return classification.scores_per_item(
            opened.model, opened.image_blocks(), reference=opened.reference, progress=opened.progress
        )
    return embedding.cosines_per_item(
        opened.model, opened.image_blocks(), opened.reference, pooling="cls", progress=opened.progress
    )


def _sentences(opened: OpenedModels) -> Sequence[Resampled]:
    sample = opened.sample("sentences")
    if opened.classifies and "labels" in sample:
        return classification.scores_per_item(
            opened.model, sample, reference=opened.reference, progress=opened.progress
        )
    return embedding.cosines_per_item(
        opened.model, sample, opened.reference, pooling=opened.pooling, progress=opened.progress
    )


def _sound(opened: OpenedModels) -> Sequence[Resampled]:
    return embedding.cosines_per_item(
        opened.model, opened.sample("sound"), opened.reference, pooling="mean", progress=opened.progress
    )


def _captions(opened: OpenedModels) -> Sequence[Resampled]:
    return embedding.cosines_per_item(
        opened.model, opened.sample("captions"), opened.reference, pooling="projected", progress=opened.progress
    )


_MEASURES: Mapping[str, Callable[[OpenedModels], Sequence[Resampled]]] = {
    "pairs": _pairs, "audio": _audio, "images": _images, "sentences": _sentences, "captions": _captions, "sound": _sound,
}  # fmt: skip
