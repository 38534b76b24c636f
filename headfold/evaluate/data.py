"""Measure a checkpoint on data of its own kind, alone or beside the one that it was folded from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.config import read_config
from ..core.errors import UserError, suggest
from ..core.json_input import read_object
from ..core.progress import Progress
from ..corpus.audio import draw_recordings
from ..corpus.images import BLOCK
from ..corpus.pairs import read_pairs, with_languages
from ..corpus.rows import Table
from ..corpus.samples import NamedSample, Sample, batches, draw_sample, image_sample_blocks, kind_of
from ..families.context import context_length
from ..hf_models import open_model, open_tokenizer, stored_dtype
from ..metrics import words
from ..parallel import each_from_main, on_main
from ..runtime.load import own_class
from . import classification, embedding, speech, translation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measured = translation.Translation | classification.Classification | embedding.Embedding
MAX_CONTEXT = 512
"""Tokens at which texts are cut, where the model itself takes more."""


@dataclass(frozen=True, slots=True)
class DataRequest:
    """The data to measure on and the settings; None stands for a default."""

    source: str | Table | NamedSample | None
    columns: Sequence[str] = ()
    context: int | None = None
    limit: int | None = None
    """Items, or tokens of plain text."""
    metric: str | None = None
    """Metric of the outputs of an encoder-decoder: "bleu" or "rouge"."""
    beams: int = 1
    max_new_tokens: int | None = None
    """Tokens of an output; 0 for none."""
    device: str = "cpu"
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class DataEvaluation:
    """The result of an evaluation on data. `kind` is the kind of data that the model takes (`corpus.samples.kind_of`)."""

    kind: str
    model: str
    reference: str | None
    source: str
    dtype: str
    measured: Measured
    notes: list[str] = field(default_factory=list)
    """What was not measured, and what it takes."""

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        facts = asdict(self)
        return facts | facts.pop("measured")


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """A model, its reference if there is one, and the data to measure them on."""

    directory: Path
    config: Mapping[str, Any]
    model: "PreTrainedModel"
    reference: "PreTrainedModel | None"
    reference_directory: Path | None
    request: DataRequest
    source: str | Table | NamedSample
    context: int
    progress: Progress
    of_data: list[str] = field(default_factory=list)
    """Notes on the data, made while they are read."""

    @classmethod
    def of(cls, directory: Path, reference: Path | None, request: DataRequest, progress: Progress) -> "OpenedModels":
        """Open the models, in their checkpoint's dtype but float32 at least.

        Raises:
            UserError: a checkpoint does not open, or the request names no source.
        """
        config = read_config(directory)
        check_source(request.source, kind_of(config), directory)
        assert request.source is not None
        dtype = request.dtype or torch.promote_types(stored_dtype(directory), torch.float32)
        return cls(
            directory=directory,
            config=config,
            model=_open(directory, dtype, request.device),
            reference=None if reference is None else _open(reference, dtype, request.device),
            reference_directory=reference,
            request=request,
            source=request.source,
            context=request.context or default_context(directory, config),
            progress=progress,
        )

    @property
    def classifies(self) -> bool:
        """Whether the model's head names the class of an item."""
        heads = self.config.get("architectures") or [""]
        return heads[0].removeprefix("Grouped").endswith(("ForImageClassification", "ForSequenceClassification"))

    @property
    def pooling(self) -> str:
        """The pooling of token embeddings: that of the reference, which a fold is to replace."""
        directories = [path for path in (self.reference_directory, self.directory) if path is not None]
        return next(filter(None, map(embedding.pooling_of, directories)), "mean")

    def sample(self, kind: str) -> Sample:
        """Return the whole source, or its first items; rank 0 reads it."""
        if isinstance(source := self.source, NamedSample):
            return source.tensors
        return on_main(lambda: draw_sample(
            kind, source, path=self.directory, num_items=self.request.limit, context=self.context, seed=None,
            columns=self.request.columns, say=self.of_data.append,
        ))  # fmt: skip

    def image_blocks(self) -> Iterator[Sample]:
        """Yield the whole source, or as many items drawn from all of it: files tend to be sorted by class."""
        if isinstance(source := self.source, NamedSample):
            return batches(source.tensors, BLOCK)
        limit = self.request.limit
        seed = None if limit is None else 0
        return each_from_main(lambda: image_sample_blocks(
            source, path=self.directory, num_items=limit, seed=seed, columns=self.request.columns
        ))  # fmt: skip

    def pairs(self) -> tuple[Any, Any, dict[str, Any]]:
        """Return the pairs of text, the tokenizer, and how outputs are written.

        Raises:
            UserError: the source is no text, but tokens.
        """
        request = self.request
        if isinstance(source := self.source, NamedSample):
            raise UserError(
                f"{source}: expected pairs of text, whose outputs can be compared, got tokens; give rows of text"
            )
        most = translation.MAX_NEW_TOKENS if request.max_new_tokens is None else request.max_new_tokens
        how = {"beams": request.beams, "max_new_tokens": most, "metric": request.metric or "bleu"}
        how |= {"context": self.context, "reference": self.reference, "progress": self.progress}
        pairs = on_main(lambda: read_pairs(source, request.columns, request.limit))
        return pairs, with_languages(open_tokenizer(self.directory), request.columns), how

    def notes(self, kind: str) -> list[str]:
        """Return lines on what is not measured as it lies there, or for want of a package."""
        writes = kind == "audio" and self.request.max_new_tokens != 0 and not isinstance(self.source, NamedSample)
        return [*self.of_data, *([words.NOT_INSTALLED] if writes and not words.is_installed() else [])]

    def recordings(self) -> tuple[Sample, dict[str, Any]]:
        """Return recordings with their transcripts, and how they are written down; tokens of a program are not.

        Raises:
            UserError: there are no transcripts.
        """
        request, source, sample = self.request, self.source, self.sample("audio")
        if "labels" not in sample:
            raise UserError(
                f"{self.source}: expected a transcript of every item, found none; name it with --columns AUDIO,TEXT"
            )
        most = speech.MAX_NEW_TOKENS if request.max_new_tokens is None else request.max_new_tokens
        said: Sequence[str] = ()
        if isinstance(source, NamedSample):
            most = 0
        else:
            said = on_main(lambda: _transcripts(source, request))
        how = {
            "said": said,
            "beams": request.beams,
            "max_new_tokens": most,
            "reference": self.reference,
            "progress": self.progress,
        }
        return sample, how


def _transcripts(source: str | Table, request: DataRequest) -> list[str]:
    """Return what is said in each recording, whole; labels are cut to the context."""
    drawn = draw_recordings(source, request.columns, request.limit, None)
    return [text.strip() for text in (drawn and drawn.texts) or ()]


def evaluate_on_data(
    name: str | Path,
    directory: Path,
    reference_name: str | Path | None,
    reference: Path | None,
    request: DataRequest,
    progress: Progress,
) -> DataEvaluation:
    """Measure a model that is no causal language model.

    An encoder-decoder: loss per target token of pairs of text, and BLEU or ROUGE of what it writes; of recordings, the word error rate.
    A classifier: accuracy and
    cross-entropy of labelled images or sentences. Any other encoder: cosines and rank correlation of its embeddings to the reference's.

    Raises:
        UserError: a checkpoint or source that cannot be read, or a source of another kind than the model's.
    """
    opened = OpenedModels.of(directory, reference, request, progress)
    kind = kind_of(opened.config)
    dtype = str(opened.model.dtype).removeprefix("torch.")
    reference_name = None if reference_name is None else str(reference_name)
    found = _MEASURES[kind](opened)
    return DataEvaluation(kind, str(name), reference_name, str(opened.source), dtype, found, opened.notes(kind))


def check_metric(metric: str | None, kind: str, model: str | Path) -> None:
    """Refuse an unknown metric of outputs, or one for a model that writes none.

    Raises:
        UserError: as said.
    """
    if metric is not None and metric not in translation.METRICS:
        raise UserError(f"--metric {metric}: {suggest(metric, translation.METRICS)}")
    if metric is not None and kind != "pairs":
        raise UserError(
            f"--metric {metric}: expected an encoder-decoder of pairs of text, got {model}, a model of {kind}; leave it out"
        )


def check_source(source: object, kind: str, model: str | Path) -> None:
    """Refuse to measure without data: only plain text is bundled.

    Raises:
        UserError: as said.
    """
    if source is None and kind != "text":
        raise UserError(
            f"{model}: expected data to measure a model of {kind} on, got none; none is bundled, give --text SOURCE"
        )


def _max_seq_length(file: Path) -> int:
    """Return the tokens that sentence-transformers truncates texts to."""
    length = read_object(file).get("max_seq_length") or MAX_CONTEXT
    if type(length) is not int or length < 1:
        raise UserError(
            f"{file}: max_seq_length: expected a positive whole number, got {length!r:.60}; correct the file"
        )
    return length


def default_context(directory: Path, config: Mapping[str, Any]) -> int:
    """Return the tokens that a text may have: what the config and sentence-transformers allow, at most `MAX_CONTEXT`."""
    limits = [context_length(config) or MAX_CONTEXT]
    file = directory / "sentence_bert_config.json"
    limits += [_max_seq_length(file)] if file.is_file() else []
    return min([MAX_CONTEXT, *limits])


def _open(directory: Path, dtype: torch.dtype, device: str) -> "PreTrainedModel":
    """Open a checkpoint with its grouped class where it has one, else with stock transformers."""
    config = read_config(directory)
    return open_model(directory, dtype=dtype, device=device, model_class=own_class(config, directory))


def _pairs(opened: OpenedModels) -> translation.Translation:
    if isinstance(opened.source, NamedSample):
        return _audio(opened)  # the loss alone, as for sound
    pairs, tokenizer, how = opened.pairs()
    return translation.evaluate_translation(opened.model, pairs, tokenizer, **how)


def _audio(opened: OpenedModels) -> translation.Translation:
    sample, how = opened.recordings()
    return speech.evaluate_speech(opened.model, sample, opened.directory, **how)


def _images(opened: OpenedModels) -> classification.Classification | embedding.Embedding:
    if opened.classifies:
        return classification.evaluate_classification(
            opened.model, opened.image_blocks(), reference=opened.reference, progress=opened.progress
        )
    return embedding.evaluate_embedding(
        opened.model, opened.image_blocks(), opened.reference, pooling="cls", progress=opened.progress
    )


def _sentences(opened: OpenedModels) -> classification.Classification | embedding.Embedding:
    sample = opened.sample("sentences")
    if opened.classifies and "labels" in sample:
        return classification.evaluate_classification(
            opened.model, sample, reference=opened.reference, progress=opened.progress
        )
    return embedding.evaluate_embedding(
        opened.model, sample, opened.reference, pooling=opened.pooling, progress=opened.progress
    )


def _sound(opened: OpenedModels) -> embedding.Embedding:
    return embedding.evaluate_embedding(
        opened.model, opened.sample("sound"), opened.reference, pooling="mean", progress=opened.progress
    )


def _captions(opened: OpenedModels) -> embedding.Embedding:
    """Compare the embeddings of both towers."""
    return embedding.evaluate_embedding(
        opened.model, opened.sample("captions"), opened.reference, pooling="projected", progress=opened.progress
    )


_MEASURES: Mapping[str, Callable[[OpenedModels], Measured]] = {
    "captions": _captions, "pairs": _pairs, "audio": _audio, "images": _images, "sentences": _sentences, "sound": _sound,
}  # fmt: skip
