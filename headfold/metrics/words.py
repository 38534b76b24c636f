"""Wrong words in transcripts of speech: substituted, left out or added, as jiwer aligns them after Whisper's normalisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..core.errors import UserError
from ..core.json_input import read_object
from .bootstrap import Units

NOT_INSTALLED = "no word error rate, which needs jiwer: pip install 'headfold[audio]'"
SPELLINGS = "normalizer.json"
"""The file beside a Whisper with British spellings and the American ones that they are compared as."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """What makes two spellings of a text alike, and its name: `english` or `basic`."""

    name: str
    plain: Callable[[str], str]


def is_installed() -> bool:
    """Return whether jiwer is there."""
    return find_spec("jiwer") is not None


def normaliser_of(directory: Path) -> Normaliser:
    """Return the normaliser that Whisper was published with, for the language that a checkpoint writes.

    For a model of English it writes numbers in digits and contractions in full, leaves out fillers, and spells as normalizer.json says.
    A model of several languages has it if its generation config names English. All others have the one for any language: lower case,
    no punctuation, and nothing in brackets.

    Raises:
        UserError: a file cannot be read.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    spellings, generation = _object(directory / SPELLINGS), _object(directory / "generation_config.json") or {}
    language, several = str(generation.get("language") or "").strip("<|>").lower(), generation.get("is_multilingual")
    of_english = several is False or (not several and spellings is not None)
    if language not in ("en", "english") and (language or not of_english):
        return Normaliser("basic", BasicTextNormalizer())
    return Normaliser("english", EnglishTextNormalizer(_spellings(spellings or {}, directory / SPELLINGS)))


def _object(file: Path) -> dict[str, Any] | None:
    return read_object(file) if file.is_file() else None


def _spellings(found: dict[str, Any], file: Path) -> dict[str, str]:
    if not all(isinstance(word, str) for word in found.values()):
        raise UserError(f"{file}: expected words by words, got something else; remove it, or copy it from the original")
    return found


def units(said: Sequence[str], written: Sequence[str], normaliser: Normaliser) -> Units:
    """Return the word error rate of transcripts, `written`, against what was `said`: wrong words as a share of the words said.

    Raises:
        UserError: there is not a word in what was said.
    """
    pairs = [(normaliser.plain(one), normaliser.plain(other)) for one, other in zip(said, written, strict=True)]
    rows = [[_wrong(*pair), len(pair[0].split())] for pair in pairs]
    if not any(number for _, number in rows):
        raise UserError("word error rate: expected words in the transcripts, found none; give --max-new-tokens 0")
    sums: Float[np.ndarray, "unit statistic"] = np.array(rows, dtype=np.float64)
    return Units(metric="wer", unit="recordings", sums=sums, lower_is_better=True)


def _wrong(said: str, written: str) -> int:
    """Return the number of wrong words of one recording."""
    import jiwer

    if not said.split():  # which jiwer does not take
        return len(written.split())
    found = jiwer.process_words(said, written)
    return int(found.substitutions + found.deletions + found.insertions)
