"""Windows of speech: recordings joined, and written in every form in which a Whisper writes."""

import json
import shutil
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from grades import assert_bitwise, assert_differs
from safetensors.torch import load_file
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_sites
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

import headfold
from headfold.calibration import collect, decoder_inputs
from headfold.core.errors import UserError
from headfold.corpus.samples import batches, draw_sample, main_input
from headfold.corpus.speech import MOST_JOINED, Part, Window, Written, encode_windows, read_windows
from headfold.evaluate.verify import model_inputs


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
    windows = read_windows(source, (), 100, 3, 30.0, 100)
    heard = []
    rate = 100
    for samples, parts in windows:
        assert len(samples) <= 30 * rate and len(parts) <= MOST_JOINED
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
        fewer = read_windows(source, (), some, 3, 30.0, 100)
        assert [window.parts for window in fewer] == [window.parts for window in windows[:some]]


def test_recordings_without_words_are_no_windows(tmp_path):
    assert read_windows(recordings(tmp_path / "sounds", [1.0, 2.0], written=False), (), 5, 0, 30.0, 100) is None


def test_recordings_longer_than_every_window_are_refused(tmp_path):
    source = recordings(tmp_path / "sounds", [31.0, 40.0])
    with pytest.raises(UserError, match="every recording lasts longer than the model's 30 seconds"):
        read_windows(source, (), 5, 0, 30.0, 100)


def test_what_is_too_long_is_told(tmp_path):
    source, told = recordings(tmp_path / "sounds", [1.0, 40.0, 2.0, 35.0]), []
    windows = read_windows(source, (), 5, 0, 30.0, 100, told.append)
    assert windows and sum(len(window.parts) for window in windows) == 2
    assert len(told) == 1 and source in told[0] and "2 of those drawn" in told[0]


def test_a_recording_without_words_is_left_out(tmp_path):
    source = tmp_path / "rows.jsonl"
    recordings(tmp_path / "sounds", [1.0] * 6)
    rows = [{"audio": f"sounds/{n:02d}.wav", "text": None if n == 2 else f"w{n}"} for n in range(6)]
    source.write_text("\n".join(map(json.dumps, rows)))
    parts = [part.text for window in read_windows(str(source), (), 9, 0, 30.0, 100) for part in window.parts]
    assert sorted(parts) == ["w0", "w1", "w3", "w4", "w5"]


def test_recordings_of_several_rates_keep_their_pitch(tmp_path):
    """They are all brought to the model's rate, whichever comes first."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number, rate in enumerate((400, 1600, 800)):
        tone = 10000 * np.sin(2 * np.pi * 100 * np.arange(2 * rate) / rate)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
            file.writeframes(tone.astype("<i2").tobytes())
        (folder / f"{number}.txt").write_text("a")
    samples = np.concatenate([window.samples for window in read_windows(str(folder), (), 9, 0, 30.0, 1600)])
    assert len(samples) == 3 * 3200
    for part in samples.reshape(3, 3200):
        spectrum = np.abs(np.fft.rfft(part))
        assert spectrum.argmax() == 200 and spectrum[199:202].sum() > 0.5 * spectrum.sum()


class Spelling:
    """A tokenizer whose text tokens are the ordinals of its characters, with Whisper's special tokens."""

    START, NO_TIMES, AFTER, END, LANGUAGE, TASK = 1000, 1004, 1003, 999, 1001, 1002
    eos_token_id, name_or_path = END, "model"

    def __init__(self, told: bool = False):
        self.told = [self.LANGUAGE, self.TASK] if told else []

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(letter) for letter in text]
        special = [self.START, *self.told, self.NO_TIMES]
        return {"input_ids": [*special, *ids, self.END] if add_special_tokens else ids}


@pytest.mark.parametrize("told", ["by its tokenizer", "by its config", "nothing"])
def test_windows_are_written_in_every_form_of_a_whisper(told):
    ab, c = [Part("a", 0.0, 1.0), Part("b", 1.0, 2.5)], [Part("c", 0.0, 0.5)]
    windows = [Window(np.zeros(4000, np.float32), parts) for parts in (ab, c, ab, c, ab)]
    own = Spelling(told == "by its tokenizer")
    prompt = () if told == "nothing" else (own.LANGUAGE, own.TASK)
    said, ctext, end = [ord(letter) for letter in " a b"], [32, ord("c")], own.END
    times = [own.NO_TIMES + 1 + round(at / 0.02) for at in (0.0, 0.5, 1.0, 2.5)]
    start, plain = [own.START, *prompt], [own.START, *prompt, own.NO_TIMES]
    expected = [
        [*plain, *said, end],
        [*start, times[0], *ctext, times[1], end],
        [own.AFTER, *ctext, *plain, *said, end],
        [*plain, *ctext, end],
        [own.AFTER, *ctext, *start, times[0], *said[:2], times[2], times[2], *said[2:], times[3], end],
    ]
    written = Written(own.AFTER, own.NO_TIMES, prompt if told == "by its config" else ())
    sample = encode_windows(windows, WhisperFeatureExtractor(chunk_length=3), own, 40, own.START, written)
    for ids, read, labels in zip(expected, sample["decoder_input_ids"], sample["labels"], strict=True):
        length = len(ids) - 1
        assert read[:length].tolist() == ids[:-1] and labels[:length].tolist() == ids[1:]
        assert set(labels[length:].tolist()) <= {-100} and set(read[length:].tolist()) <= {end}
    (batch,) = batches({name: tensor[1:2] for name, tensor in sample.items()}, 4)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (1, len(expected[1]) - 1)


def test_a_tokenizer_without_a_token_that_ends_is_refused():
    own, windows = Spelling(), [Window(np.zeros(4000, np.float32), [Part("a", 0.0, 1.0)])]
    own.eos_token_id = None
    with pytest.raises(UserError, match=r"tokenizer_config\.json: expected eos_token"):
        encode_windows(windows, None, own, 40, None, Written(None, None))


def test_a_text_before_leaves_room_for_what_is_said():
    own, part = Spelling(), Part("abcdefgh", 0.0, 0.5)
    windows = [Window(np.zeros(4000, np.float32), [part])] * 3
    for context in (2, 4, 8, 12):
        sample = encode_windows(
            windows, WhisperFeatureExtractor(chunk_length=3), own, context, own.START, Written(own.AFTER, own.NO_TIMES)
        )
        rows = sample["decoder_input_ids"]
        assert rows.shape[1] <= context and own.START in rows[2].tolist()


def test_a_model_without_forms_writes_text():
    own, windows = Spelling(), [Window(np.zeros(4000, np.float32), [Part("a", 0.0, 1.0)])] * 5
    sample = encode_windows(windows, WhisperFeatureExtractor(chunk_length=3), own, 40, None, Written(None, None))
    assert all(row == [own.START, own.NO_TIMES, 32, ord("a")] for row in sample["decoder_input_ids"].tolist())


def test_what_the_decoder_reads_may_be_given():
    """The statistics, the inputs of a verification and the batches are those of the same tokens made from the labels."""
    model, sample = stock_model(tiny_checkpoint("whisper")), tiny_sample("whisper", 5)
    sites = [site for site, _ in tiny_sites(tiny_checkpoint("whisper"))]
    given = {**sample, "decoder_input_ids": decoder_inputs(model, sample["labels"])}
    for name, stats in collect(model, sites, given).items():
        for key, tensor in collect(model, sites, sample)[name].tensors.items():
            assert_bitwise(stats.tensors[key], tensor)
    mine, theirs = (model_inputs(model, one)["decoder_input_ids"] for one in (given, sample))
    assert_bitwise(mine, theirs)
    other = {**given, "decoder_input_ids": given["decoder_input_ids"].flip(0)}
    assert_differs(model_inputs(model, other)["decoder_input_ids"].double(), theirs.double())
    assert main_input(dict(sorted(given.items()))) is given["input_features"]


def test_a_source_becomes_windows_in_every_form(tmp_path):
    """As calibration asks for it, with the tokens that the generation config names."""
    folder = tmp_path / "whisper"
    WhisperFeatureExtractor(feature_size=10, chunk_length=2).save_pretrained(folder)
    vocabulary = {
        word: number
        for number, word in enumerate(["[UNK]", "w", "<s>", "</s>", "<p>", "<n>", "<0>", *map(str, range(200))])
    }
    spelling = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    spelling.pre_tokenizer = pre_tokenizers.Whitespace()
    spelling.post_processor = processors.TemplateProcessing(
        single="<s> <n> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3), ("<n>", 5)]
    )
    PreTrainedTokenizerFast(tokenizer_object=spelling, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    (folder / "generation_config.json").write_text(
        '{"decoder_start_token_id": 2, "prev_sot_token_id": 4, "no_timestamps_token_id": 5}'
    )
    source = recordings(tmp_path / "sounds", [0.5] * 30)
    drawn = dict(path=folder, num_items=10, context=40, seed=0)
    plain = draw_sample("audio", source, **drawn)
    joined = draw_sample("audio", source, joined=True, **drawn)
    assert "decoder_input_ids" not in plain and len(joined["labels"]) == 10
    read = joined["decoder_input_ids"].tolist()
    assert [row[0] for row in read] == [2, 2, 4, 2, 4] * 2
    assert [5 in row for row in read] == [True, False, True, True, False] * 2


def test_heads_that_date_words_are_named_by_their_new_places(tmp_path: Path) -> None:
    """A fold moves query heads; generation_config.json names those of cross-attention that tell when a word is said."""
    source = shutil.copytree(tiny_checkpoint("whisper"), tmp_path / "whisper")
    generation, named = json.loads((source / "generation_config.json").read_text()), [[1, 5], [0, 2], [1, 0]]
    (source / "generation_config.json").write_text(json.dumps(generation | {"alignment_heads": named}))
    how = {"merge": "first", "group": "random", "refit": False, "verify": False, "seed": 1}
    headfold.fold(source, tmp_path / "fold", kv_heads="1/4", **how)
    found = json.loads((tmp_path / "fold/generation_config.json").read_text())["alignment_heads"]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "fold"))
    assert found != named
    for (layer, head), (same_layer, place) in zip(named, found, strict=True):
        query = f"model.decoder.layers.{layer}.encoder_attn.q_proj.weight"
        size = before[query].shape[0] // 8
        theirs, ours = (t[query].unflatten(0, (-1, size)) for t in (before, after))
        assert same_layer == layer and torch.equal(ours[place], theirs[head])
    (source / "generation_config.json").write_text(json.dumps({**generation, "alignment_heads": "all of them"}))
    headfold.fold(source, tmp_path / "other", kv_heads="1/4", **how)
    assert json.loads((tmp_path / "other/generation_config.json").read_text()) == generation
