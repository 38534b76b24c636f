"""Windows of speech: recordings joined, and written in every form in which a Whisper writes."""

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from headfold.core.errors import UserError
from headfold.corpus.samples import batches
from headfold.corpus.speech import MOST_JOINED, Part, Window, Written, encode_windows, read_windows


def recordings(folder: Path, seconds: Sequence[float], *, written: bool = True) -> str:
    """Clips of one level each, with a word of their number."""
    folder.mkdir(parents=True)
    for number, length in enumerate(seconds):
        with wave.open(str(folder / f"{number:02d}.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(100)
            file.writeframes(np.full(round(length * 100), 1000 * (number + 1), "<i2").tobytes())
        if written:
            (folder / f"{number:02d}.txt").write_text(f" w{number} ")
    return str(folder)


def test_recordings_are_joined_to_windows(tmp_path):
    """Each recording once, whole, with its own words in its own place; a smaller sample is the beginning of a larger one."""
    lengths = [1.0, 2.0, 0.5, 3.0, 40.0, 1.5, *[0.25] * 20]
    source = recordings(tmp_path / "sounds", lengths)
    windows = read_windows(source, (), 100, 3, 30.0)
    heard = []
    for samples, rate, parts in windows:
        assert rate == 100 and len(samples) <= 30 * rate and len(parts) <= MOST_JOINED
        at = 0.0
        for text, start, end in parts:
            (level,) = set(samples[round(start * rate) : round(end * rate)].tolist())
            number = round(level * 2**15 / 1000) - 1
            assert text == f"w{number}" and start == at and end - start == pytest.approx(lengths[number])
            heard.append(number)
            at = end
        assert round(at * rate) == len(samples)
    assert sorted(heard) == [number for number, length in enumerate(lengths) if length <= 30]
    assert 1 < len(windows) < len(heard)
    for some in (1, 2, len(windows)):
        fewer = read_windows(source, (), some, 3, 30.0)
        assert [window.parts for window in fewer] == [window.parts for window in windows[:some]]


def test_recordings_without_words_are_no_windows(tmp_path):
    assert read_windows(recordings(tmp_path / "sounds", [1.0, 2.0], written=False), (), 5, 0, 30.0) is None


def test_recordings_longer_than_every_window_are_refused(tmp_path):
    source = recordings(tmp_path / "sounds", [31.0, 40.0])
    with pytest.raises(UserError, match="every recording lasts longer than the model's 30 seconds"):
        read_windows(source, (), 5, 0, 30.0)


class Spelling:
    """A tokenizer whose text tokens are the ordinals of its characters, with Whisper's special tokens."""

    START, NO_TIMES, AFTER, END = 1000, 1004, 1003, 999
    eos_token_id = END

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(letter) for letter in text]
        return {"input_ids": [self.START, self.NO_TIMES, *ids, self.END] if add_special_tokens else ids}


def test_windows_are_written_in_every_form_of_a_whisper():
    ab, c = [Part("a", 0.0, 1.0), Part("b", 1.0, 2.5)], [Part("c", 0.0, 0.5)]
    windows = [Window(np.zeros(4000, np.float32), 16000, parts) for parts in (ab, c, ab, c)]
    extractor = WhisperFeatureExtractor(chunk_length=3)
    own = Spelling()
    said, end = [ord(letter) for letter in " a b"], own.END
    times = [own.NO_TIMES + 1 + round(at / 0.02) for at in (0.0, 0.5)]
    expected = [
        [own.START, own.NO_TIMES, *said, end],
        [own.START, times[0], 32, ord("c"), times[1], end],
        [own.START, own.NO_TIMES, *said, end],
        [own.AFTER, *said[-3:], own.START, times[0], 32, ord("c"), times[1], end],
    ]
    sample = encode_windows(windows, extractor, own, 8, own.START, Written(own.AFTER, own.NO_TIMES))
    assert sample["input_features"].shape[0] == 4
    for ids, read, written in zip(expected, sample["decoder_input_ids"], sample["labels"], strict=True):
        ids = [*ids[:8], end] if len(ids) > 9 else ids
        length = len(ids) - 1
        assert read[:length].tolist() == ids[:-1] and written[:length].tolist() == ids[1:]
        assert set(written[length:].tolist()) <= {-100} and set(read[length:].tolist()) <= {end}
    plain = encode_windows(windows, extractor, own, 8, own.START, None)
    assert all(row[1] == own.NO_TIMES for row in plain["decoder_input_ids"].tolist())
    (batch,) = batches({name: tensor[1:2] for name, tensor in sample.items()}, 4)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (1, 5)
