"""Models that read samples of sound: pieces without padding for encoders, padded recordings with transcripts for Moonshine."""

import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

import headfold
from headfold.calibration import batches, mask_of
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.corpus.audio import read_audio
from headfold.corpus.samples import draw_sample, kind_of, random_sample
from headfold.corpus.sound import SECONDS, read_pieces

RATE = 400
"""Samples per second of the tiny models."""


def write(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven recordings of one to seven seconds, with what is said in them."""
    folder, generator = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for number in range(1, 8):
        write(folder / f"{number}.wav", generator.uniform(-0.9, 0.9, number * RATE))
        (folder / f"{number}.txt").write_text("a b a"[: 1 + 2 * (number % 3)])
    return folder


def checkpoint(name: str, directory: Path) -> Path:
    """A tiny float32 model with a feature extractor and a tokenizer."""
    shutil.copytree(tiny_checkpoint(name, torch.float32), directory)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=name == "moonshine").save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "?": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="?").save_pretrained(directory)
    return directory


def test_pieces_are_all_of_the_sound_in_order(recordings: Path) -> None:
    sounds, _ = read_audio(str(recordings))
    whole = np.concatenate([samples for samples, _ in sounds])
    pieces = read_pieces(str(recordings), (), None, None, RATE)
    assert [len(piece) for piece in pieces] == [SECONDS * RATE] * (28 // SECONDS)
    assert np.array_equal(np.concatenate(pieces), whole[: 28 // SECONDS * SECONDS * RATE])
    assert len(read_pieces(str(recordings), (), 2, 0, RATE)) <= 2


def test_less_than_a_piece_is_one_and_less_than_a_second_none(recordings: Path, tmp_path: Path) -> None:
    (short,) = read_pieces(str(recordings / "3.wav"), (), None, None, RATE)
    assert len(short) == 3 * RATE
    write(tmp_path / "click.wav", np.ones(RATE // 2))
    with pytest.raises(UserError, match="at least a second of sound, got 200 samples"):
        read_pieces(str(tmp_path), (), None, None, RATE)


@pytest.mark.parametrize("name", ["wav2vec2", "hubert"])
def test_an_encoder_of_sound_folds_on_sound(name: str, recordings: Path, tmp_path: Path) -> None:
    original = checkpoint(name, tmp_path / "original")
    result = headfold.fold(original, tmp_path / "fold", kv_heads="1/2", calibration=str(recordings), items=8)
    assert result.verification is not None and result.verification.passed
    found = headfold.eval(tmp_path / "fold", reference=original, text=str(recordings))
    assert found.kind == "sound" and 0.5 < found.measured.cosine < 1 - 1e-6
    assert headfold.eval(original, reference=original, text=str(recordings)).measured.cosine == pytest.approx(1)
    worse = tmp_path / "mean"
    headfold.fold(original, worse, kv_heads="1/2", calibration=str(recordings), items=8, merge="mean", refit=False)
    assert headfold.eval(worse, reference=original, text=str(recordings)).measured.cosine < found.measured.cosine


def test_moonshine_folds_on_recordings_with_transcripts(recordings: Path, tmp_path: Path) -> None:
    original = checkpoint("moonshine", tmp_path / "original")
    result = headfold.fold(original, tmp_path / "fold", kv_heads="1/2", calibration=str(recordings), items=7)
    assert result.verification is not None and result.verification.passed
    found = headfold.eval(tmp_path / "fold", reference=original, text=str(recordings))
    assert found.kind == "audio" and found.measured.nll != found.measured.reference_nll


def test_padding_of_sound_is_not_measured(recordings: Path, tmp_path: Path) -> None:
    original = checkpoint("moonshine", tmp_path / "original")
    sample = draw_sample("audio", str(recordings), path=original, num_items=7, context=8, seed=0)
    lengths = sample["attention_mask"].sum(1)
    assert sorted(lengths.tolist()) == [RATE * number for number in range(1, 8)]
    sites = {site.name: site for site in open_source(original).every_site}
    states = torch.zeros(7, 28, 3)
    for name in ("encoder.0.self", "decoder.0.cross"):
        mask = mask_of(sites[name], sample, states, queries=False)
        assert mask is not None and torch.equal(mask.sum(1), lengths * 28 // sample["input_values"].shape[1])
    shortest = lengths.argsort()[:2]
    (batch,) = batches({key: tensor[shortest] for key, tensor in sample.items()})
    assert batch["input_values"].shape == (2, 2 * RATE)


@pytest.mark.parametrize("name", ["wav2vec2", "moonshine"])
def test_random_sound_is_what_the_model_takes(name: str) -> None:
    config = open_source(tiny_checkpoint(name)).checkpoint.config
    assert random_sample(kind_of(config), config, 2)["input_values"].shape == (2, 16_000)
