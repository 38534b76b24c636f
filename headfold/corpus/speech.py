"""Windows of speech for calibration: recordings joined to the length that a model takes, in every form in which a Whisper writes them.

A Whisper writes text alone, or with the times of its parts, or either after the text before; each form begins with tokens of its own, and a
fold calibrated on the first alone fails at the others.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UserError
from .audio import Recordings, draw_recordings, resampled
from .pairs import IGNORED, padded
from .rows import Table

MOST_JOINED = 8
"""Recordings that may be joined into one window."""
_LEAST_FILLED, _MOST_FILLED = 0.2, 0.95
"""Shares of a window between which the length of joined recordings is drawn."""
_FORMS = ("text", "times", "text after text", "text", "times after text")
"""What is written for one window after another."""
_SECONDS_PER_STEP = 0.02
"""Of Whisper's timestamps."""


class Part(NamedTuple):
    """A recording in a window: its transcript, and where it begins and ends, in seconds."""

    text: str
    start: float
    end: float


class Window(NamedTuple):
    """Joined recordings."""

    samples: Float[np.ndarray, " sample"]
    parts: list[Part]


class Written(NamedTuple):
    """Ids of the tokens that say how a Whisper writes; None for what it does not know."""

    after: int | None
    """What stands before the text before."""
    no_times: int | None
    """What stands before text without timestamps. The timestamps follow it in the vocabulary."""
    language: tuple[int, ...] = ()
    """The language and the task, which a multilingual Whisper reads first where its tokenizer does not."""


def read_windows(
    source: str | Table,
    columns: Sequence[str],
    num_items: int,
    seed: int,
    seconds: float,
    rate: int,
    say: Callable[[str], None] = lambda note: None,
) -> list[Window] | None:
    """Return recordings with transcripts joined to windows of at most `seconds`, up to `num_items` of them, at `rate` samples per second.

    A model that takes windows of one length computes as much for a short recording as for a full window, and learns less from it. The
    lengths of the windows vary, so that the model's answers to short recordings are among what is seen. What lasts longer than a
    window is left out, as its transcript would say more than is heard, and so is what has no transcript. None where nothing has one.
    `say` is told how many were too long.

    Raises:
        UserError: as `audio.read_audio`, or every recording lasts longer than a window.
    """
    wanted = num_items
    while True:
        drawn = draw_recordings(source, columns, wanted, seed, written=True)
        if drawn is None or drawn.texts is None:
            return None
        ended = len(drawn.rows) < wanted
        windows: list[Window] = []
        too_long: list[int] = []
        for numbered in _joined(drawn, seed, seconds, too_long, ended=ended):
            windows.append(_window(numbered, drawn.texts, rate))
            if len(windows) == num_items:
                break
        if len(windows) == num_items or ended:
            break
        wanted *= 2  # a larger sample begins with the smaller one
    if not windows:
        raise UserError(f"{source}: every recording lasts longer than the model's {seconds:g} seconds; cut them there")
    if too_long:
        say(
            f"{source}: recordings that last longer than the model's {seconds:g} seconds are left out, {len(too_long)} of those drawn; "
            "cut them there"
        )
    return windows


_Numbered = list[tuple[int, Float[np.ndarray, " _"], int]]
"""Number, samples and samples per second of recordings."""


def _joined(drawn: Recordings, seed: int, seconds: float, too_long: list[int], *, ended: bool) -> Iterator[_Numbered]:
    """Yield the recordings of each window; of one that more recordings might fill, only if they `ended`.

    The numbers of recordings that last longer than a window are added to `too_long`.
    """
    draws = random.Random(seed)

    def length() -> float:
        return seconds * draws.uniform(_LEAST_FILLED, _MOST_FILLED)

    window: _Numbered = []
    filled, wanted = 0.0, length()
    for number in range(len(drawn.rows)):
        samples, rate = drawn.sound(number)
        lasts = len(samples) / rate
        if lasts > seconds:
            too_long.append(number)
            continue
        if window and (filled + lasts > wanted or len(window) == MOST_JOINED):
            yield window
            window, filled, wanted = [], 0.0, length()
        window.append((number, samples, rate))
        filled += lasts
    if window and ended:
        yield window


def _window(numbered: _Numbered, texts: Sequence[str], rate: int) -> Window:
    sounds = [resampled(samples, found, rate) for _, samples, found in numbered]
    ends = np.cumsum([len(sound) for sound in sounds]) / rate
    parts = [
        Part(texts[number].strip(), float(end - len(sound) / rate), float(end))
        for (number, _, _), sound, end in zip(numbered, sounds, ends, strict=True)
    ]
    return Window(np.concatenate(sounds), parts)


def encode_windows(
    windows: Sequence[Window],
    extractor: Any,
    tokenizer: Any,
    context: int,
    decoder_start: int | None,
    written: Written,
) -> dict[str, Tensor]:
    """Return `input_features` (item, mel, frame), and what the decoder reads and writes after each of its tokens: `decoder_input_ids` and
    `labels` (item, token), the latter -100 at padding.

    Raises:
        UserError: the tokenizer has no token that ends a transcript.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}/tokenizer_config.json: expected eos_token, which ends a transcript, got none; copy the model's own "
            "file there"
        )
    sequences = []
    for number, window in enumerate(windows):
        form = _FORMS[number % len(_FORMS)]
        before = windows[number - 1].parts if form.endswith("after text") else []
        ids = [*_before(before, tokenizer, context, written), *_prefix(tokenizer, decoder_start, written)]
        if form.startswith("times") and written.no_times is not None:
            ids = [one for one in ids if one != written.no_times]
            for part in window.parts:
                first, last = (written.no_times + 1 + round(at / _SECONDS_PER_STEP) for at in (part.start, part.end))
                ids += [first, *_tokens(tokenizer, [part]), last]
        else:
            ids += _tokens(tokenizer, window.parts)
        sequences.append([*ids[:context], tokenizer.eos_token_id])
    sounds = [window.samples for window in windows]
    features = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    return {
        "input_features": features.float(),
        "labels": padded([ids[1:] for ids in sequences], IGNORED),
        "decoder_input_ids": padded([ids[:-1] for ids in sequences], tokenizer.eos_token_id),
    }


def _tokens(tokenizer: Any, parts: Sequence[Part]) -> list[int]:
    text = "".join(f" {part.text}" for part in parts)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _prefix(tokenizer: Any, decoder_start: int | None, written: Written) -> list[int]:
    """Return what stands before text without timestamps."""
    whole: list[int] = tokenizer("", verbose=False)["input_ids"]
    start = whole[:1] if decoder_start is None else [decoder_start]
    own = [one for one in whole if one not in (*start, written.no_times, tokenizer.eos_token_id)]
    return [*start, *(own or written.language), *([] if written.no_times is None else [written.no_times])]


def _before(parts: Sequence[Part], tokenizer: Any, context: int, written: Written) -> list[int]:
    """Return what stands before it of the text before: at most half of the context, as in Whisper's own loop over long recordings."""
    if not parts or written.after is None:
        return []
    said, most = _tokens(tokenizer, parts), context // 2 - 1
    return [written.after, *said[max(0, len(said) - most) :]]
