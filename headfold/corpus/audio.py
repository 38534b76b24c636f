"""Speech for models that write it down: sound files, or a column of a table with them, through the model's own feature extractor."""

import io
import wave
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UserError
from .pairs import IGNORED, padded
from .rows import TABLES, Row, Stream, Table, file_of, is_table, open_rows, require, value
from .text import read_text

COLUMNS = ("audio", "file")
TRANSCRIPTS = ("text", "sentence", "transcription")
ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
"""Endings of the files of a folder. soundfile reads them; without it, wav of 16 bits is read."""
_BYTES = 2
MOST_FRAMES, LONGEST, HIGHEST_RATE, MOST_CHANNELS = 2**29, 6 * 60 * 60, 2**20, 64
"""Bounds of a recording: instants of sampling, seconds, instants per second and channels. Of compressed silence a small file may hold any
length."""
PIECE = 2**22
"""Instants that are decoded at once."""
Sounds = list[tuple[Float[np.ndarray, " _"], int]]
"""Mono samples in [-1, 1], and samples per second, of each item."""


def read_audio(
    source: str | Table, columns: Sequence[str] = (), num_items: int | None = None, seed: int | None = None
) -> tuple[Sounds, list[str] | None]:
    """Return the sound of each item, and the transcripts if every item has one.

    In a folder, the transcript of NAME.wav (or .flac …) is NAME.txt; in a table it is column `text`, `sentence`, `transcription` or
    `columns[1]`.

    Raises:
        UserError: an unreadable or empty source, a missing column, or audio that soundfile does not read.
    """
    drawn = draw_recordings(source, columns, num_items, seed)
    if drawn is None:
        raise UserError(f"{source}: expected audio, found none; give another source")
    return [drawn.sound(number) for number in range(len(drawn.rows))], drawn.texts


class Recordings(NamedTuple):
    """Rows of a source, decoded when they are asked for, and their transcripts if every one has one."""

    rows: list[Row]
    names: tuple[str, ...]
    folder: Path
    where: str
    texts: list[str] | None

    def sound(self, number: int) -> tuple[Float[np.ndarray, " _"], int]:
        """Return the samples of a recording, and how many there are per second."""
        return _decoded(value(self.rows[number], self.names[0]), self.folder, self.where)


def draw_recordings(
    source: str | Table, columns: Sequence[str], num_items: int | None, seed: int | None, *, written: bool = False
) -> Recordings | None:
    """Return the recordings of a source that `read_audio` would read, or of those that are `written` (have a transcript); None if there is
    none.

    Raises:
        UserError: as `read_audio`, but for audio that cannot be decoded.
    """
    rows = _open(source)
    names = _columns(rows, columns)
    if written and not names[1:]:
        return None

    def usable(row: Row) -> bool:
        return value(row, names[0]) is not None and (not written or isinstance(value(row, names[1]), str))

    drawn = list(rows.draw(names, num_items, seed, usable))
    if not drawn:
        return None
    texts = [value(row, names[1]) for row in drawn] if names[1:] else []
    all_written = texts and all(isinstance(text, str) for text in texts)
    return Recordings(drawn, names, Path(str(source)).parent, rows.name, texts if all_written else None)


def _open(source: str | Table) -> Table | Stream:
    if isinstance(source, Table) or is_table(source):
        return open_rows(source)
    path = Path(source)
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in candidates if file.suffix.lower() in ENDINGS and file.is_file()]
    if not files:
        raise UserError(
            f"{source}: a speech model needs audio, found none; give a folder of {', '.join(ENDINGS)} files or {TABLES}"
        )
    written = all(file.with_suffix(".txt").is_file() for file in files)

    def row(file: Path) -> Row:
        text = {"text": read_text(file.with_suffix(".txt")).strip()} if written else {}
        return {"audio": {"path": str(file)}} | text

    columns = ("audio", "text") if written else ("audio",)
    return Table(source, columns, len(files), lambda numbers, named: (row(files[number]) for number in numbers))


def _columns(rows: Table | Stream, named: Sequence[str]) -> tuple[str, ...]:
    if named:
        return require(rows, named)
    found = [next((name for name in names if name in rows.columns), None) for names in (COLUMNS, TRANSCRIPTS)]
    if found[0] is None:
        raise UserError(
            f"{rows.name}: a speech model needs a column of audio, found {', '.join(rows.columns)}; "
            "name it with --columns AUDIO or AUDIO,TEXT"
        )
    return tuple(name for name in found if name is not None)


def _decoded(found: Any, folder: Path, where: str) -> tuple[Float[np.ndarray, " sample"], int]:
    entry = found if isinstance(found, Mapping) else {"path": found}
    data, path = entry.get("bytes"), entry.get("path")
    if entry.get("array") is not None:
        try:
            samples, rate = np.asarray(entry["array"], np.float32).reshape(-1), int(entry["sampling_rate"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: expected an array of samples and its sampling_rate ({error})") from error
        _check_length(len(samples), 1, rate, where)
        return samples, rate
    file: io.BytesIO | str
    if isinstance(data, bytes):
        file = io.BytesIO(data)
    elif isinstance(path, str):
        file = str(file_of(path, folder, where))
    else:
        raise UserError(f"{where}: expected audio or its path, got {type(found).__name__}; name another column")
    return _read(file, f"{where}: {path or 'an item'}")


def _read(file: io.BytesIO | str, where: str) -> tuple[Float[np.ndarray, " sample"], int]:
    try:
        import soundfile
    except ImportError:
        return _plain_wav(file, where)
    try:
        with soundfile.SoundFile(file) as opened:
            _check_length(opened.frames, opened.channels, opened.samplerate, where)
            # No more than was checked: a stream may go on after the length that its header gives.
            pieces = opened.blocks(PIECE, frames=opened.frames, dtype="float32", always_2d=True)
            return _mono(pieces, where), opened.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{where}: expected sound ({error}); convert it to wav") from error


def _plain_wav(file: io.BytesIO | str, where: str) -> tuple[Float[np.ndarray, " sample"], int]:
    """Read wav of 16 bits, which the standard library can."""
    try:
        with wave.open(file) as opened:
            channels, rate = opened.getnchannels(), opened.getframerate()
            _check_length(opened.getnframes(), channels, rate, where)
            if opened.getsampwidth() != _BYTES:
                raise wave.Error(f"it has {8 * opened.getsampwidth()} bits")
            pieces = iter(partial(opened.readframes, PIECE), b"")
            return _mono((_samples(piece, channels) for piece in pieces), where), rate
    except (
        wave.Error,
        EOFError,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: a part is longer than what it lies in
        said = str(error) or "its parts do not fit into each other"
        raise UserError(
            f"{where}: expected wav of 16 bits ({said}); convert it, or install what reads other sound: pip install 'headfold[audio]'"
        ) from error


def _samples(frames: bytes, channels: int) -> Float[np.ndarray, "_ channel"]:
    """Return samples in [-1, 1]; a frame that was cut at the end is left out."""
    whole = len(frames) // (_BYTES * channels) * channels
    return np.frombuffer(frames, "<i2", whole).reshape(-1, channels).astype(np.float32) / 2**15


def _mono(pieces: Iterator[Float[np.ndarray, "_ channel"]], where: str) -> Float[np.ndarray, " sample"]:
    """Return the mean of the channels of all pieces together.

    Raises:
        UserError: there is no sample.
    """
    means = [piece.mean(1) for piece in pieces if len(piece)]
    if not means:
        raise UserError(f"{where}: expected sound, got a recording of no length; remove it")
    return np.concatenate(means)


def _check_length(frames: int, channels: int, rate: int, where: str) -> None:
    """Refuse a recording beyond the bounds.

    Raises:
        UserError: as said.
    """
    longest = min(MOST_FRAMES, LONGEST * rate)
    if not (1 <= rate <= HIGHEST_RATE and 1 <= channels <= MOST_CHANNELS and 0 <= frames <= longest):
        raise UserError(
            f"{where}: expected sound of at most {LONGEST // 3600} hours, {MOST_FRAMES} samples and {HIGHEST_RATE} of them per second, got "
            f"{frames} samples of {channels} channels, {rate} per second; cut or convert it"
        )


def encode_audio(
    sounds: Sequence[tuple[Float[np.ndarray, " _"], int]],
    texts: Sequence[str] | None,
    extractor: Any,
    tokenizer: Any,
    context: int,
    decoder_start: int | None = None,
) -> dict[str, Tensor]:
    """Return `input_features` (item, mel, frame) or, for a model that reads samples, `input_values` and `attention_mask` (item, sample),
    and, if there are transcripts, `labels` (item, token), -100 at padding.

    The model adds `decoder_start` before the labels itself, so it is removed if the tokenizer adds it too.
    """
    rate = extractor.sampling_rate
    same_rate = [resampled(samples, found, rate) for samples, found in sounds]
    sample = encoded(same_rate, extractor)
    if texts is None:
        return sample
    labels = tokenizer(list(texts), truncation=True, max_length=context, verbose=False)["input_ids"]
    labels = [ids[1:] if ids[:1] == [decoder_start] else ids for ids in labels]
    return sample | {"labels": padded(labels, IGNORED)}


def encoded(sounds: Sequence[Float[np.ndarray, " _"]], extractor: Any) -> dict[str, Tensor]:
    """Return what an extractor makes of sounds at its own rate: features of one length, or samples, padded, with their mask."""
    if "input_values" not in extractor.model_input_names:
        made = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {"input_features": made["input_features"].float()}
    options = {"padding": True, "return_attention_mask": True, "return_tensors": "pt"}
    made = extractor(sounds, sampling_rate=extractor.sampling_rate, **options)
    return {"input_values": made["input_values"].float(), "attention_mask": made["attention_mask"].long()}


def resampled(samples: Float[np.ndarray, " sample"], rate: int, wanted: int) -> Float[np.ndarray, " resampled"]:
    """Return the sound at another number of samples per second."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)
