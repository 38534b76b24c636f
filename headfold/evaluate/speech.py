"""Loss of a model that writes down speech, and the wrong words of what it writes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.progress import Progress, no_progress
from ..corpus.samples import Sample
from ..families.context import context_length
from ..hf_models import open_tokenizer
from ..metrics import words
from ..metrics.bootstrap import Units
from . import translation
from .translation import Translation, per_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NEW_TOKENS = 224
"""Half of the positions of a Whisper's decoder: as long as its transcripts of a window get."""
_STARTS = 4
"""Tokens before a transcript: its start, the language, the task, and that no times follow."""


def longest_transcript(model: "PreTrainedModel", wanted: int) -> int:
    """Return the tokens that a transcript may have: those wanted, or as many as the decoder has positions after what it begins with."""
    context = context_length(model.config.to_dict())
    return wanted if context is None else max(1, min(wanted, context - _STARTS))


class Transcriber:
    """Writes down the recordings of a sample with one model after the other, and counts wrong words against their transcripts."""

    def __init__(
        self, directory: Path, sample: Sample, said: Sequence[str], beams: int, max_new_tokens: int, progress: Progress
    ) -> None:
        """Read the tokenizer and the normaliser of a checkpoint. With `max_new_tokens=0`, or without jiwer, nothing is written down.

        `said` has the whole transcripts: labels may be cut, and what is written is not.
        """
        self.writes, self.said = max_new_tokens > 0 and words.is_installed(), said
        self._sample, self._progress = sample, progress
        self._how: dict[str, Any] = {"beams": beams, "progress": progress}
        self._limit = max_new_tokens
        if self.writes:
            self._tokenizer, self.normaliser = open_tokenizer(directory), words.normaliser_of(directory)

    def written(self, model: "PreTrainedModel | None") -> list[str] | None:
        """Return the transcript that a model writes of each recording; None without a model, or where nothing is written down."""
        if model is None or not self.writes:
            return None
        most = longest_transcript(model, self._limit)
        return translation.generate_texts(model, self._sample, self._tokenizer, max_new_tokens=most, **self._how)

    def scores(
        self, model: "PreTrainedModel", written: list[str] | None, by_reference: list[str] | None
    ) -> list[Units]:
        """Return the loss per token of the transcripts and, of what was written, the word error rate, recording by recording; also that
        against what the reference wrote, where that has a word.
        """
        losses = translation.target_losses(model, self._sample, progress=self._progress)
        found = [per_token("nll", "recordings", losses)]
        if written is not None:
            found.append(words.units(self.said, written, self.normaliser))
            if by_reference is not None and any(map(self.normaliser.plain, by_reference)):
                found.append(replace(words.units(by_reference, written, self.normaliser), metric="wer_to_reference"))
        return found


def scores_per_recording(
    model: "PreTrainedModel",
    sample: Sample,
    directory: Path,
    *,
    said: Sequence[str],
    reference: "PreTrainedModel | None",
    beams: int,
    max_new_tokens: int,
    progress: Progress,
) -> list[Units]:
    """Return the figures of `evaluate_speech` but for those of the reference, recording by recording.

    Raises:
        UserError: as `evaluate_speech`.
    """
    transcriber = Transcriber(directory, sample, said, beams, max_new_tokens, progress)
    return transcriber.scores(model, transcriber.written(model), transcriber.written(reference))


def evaluate_speech(
    model: "PreTrainedModel",
    sample: Sample,
    directory: Path,
    *,
    said: Sequence[str],
    reference: "PreTrainedModel | None" = None,
    beams: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = no_progress,
) -> Translation:
    """Measure an open model, whose files lie in `directory`, and its reference: the loss of what is said, the word error rate of what each
    writes, and that of the model against what the reference writes. `said` has the whole transcript of each recording.

    Raises:
        UserError: the model has no language-model head, its tokenizer does not load, or no transcript has a word.
    """
    start = time.perf_counter()
    transcriber = Transcriber(directory, sample, said, beams, max_new_tokens, progress)
    written, by_reference = transcriber.written(model), transcriber.written(reference)
    own = transcriber.scores(model, written, by_reference)
    other = [] if reference is None else transcriber.scores(reference, by_reference, None)
    totals = {units.metric: units.total for units in own} | {
        f"reference_{units.metric}": units.total for units in other
    }
    seconds, name = time.perf_counter() - start, transcriber.normaliser.name if transcriber.writes else None
    return Translation(
        num_items=len(sample["labels"]), num_tokens=int(own[0].sums[:, 1].sum()), beams=beams, seconds=seconds, normaliser=name, **totals
    )  # fmt: skip
