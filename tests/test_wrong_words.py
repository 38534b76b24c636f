"""The word error rate of a model of speech: against what was said, and against what its reference writes."""

# ruff: noqa: F811 - fixtures are arguments

import json
import wave
from pathlib import Path

import pytest
from test_cli import run  # noqa: F401 - a fixture
from test_examples import speech
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import headfold
from headfold.core.errors import UserError
from headfold.metrics import words

needs_jiwer = pytest.mark.skipif(not words.is_installed(), reason="words are aligned by jiwer: pip install jiwer")
BASIC = words.Normaliser("basic", str.lower)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A tiny Whisper, a fold of it, and recordings with transcripts."""
    model, sounds, fold, *_ = speech(tmp_path_factory.mktemp("speech"))
    size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    named = ["?", "<s>", "</s>", "a", "b", "c", *(f"w{number}" for number in range(6, size))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(named)}, "?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", eos_token="</s>").save_pretrained(model)
    headfold.fold(model, fold, kv_heads=1, group="contiguous", merge="mean", refit=False, verify=False)
    return model, fold, sounds


@needs_jiwer
def test_wrong_words_are_those_replaced_left_out_and_added() -> None:
    said = ["A b c d", "", "e f"]
    heard = ["a x c d", "oh no", "f g h"]  # one replaced; two added to silence; one left out and two added
    found = words.units(said, heard, BASIC)
    assert found.sums.tolist() == [[1, 4], [2, 0], [3, 2]] and found.total == 1.0 and found.lower_is_better
    assert words.units(said, said, BASIC).total == 0
    with pytest.raises(UserError, match="--max-new-tokens 0"):
        words.units(["", " "], ["a", "b"], BASIC)


@pytest.mark.parametrize(
    ("generation", "spellings", "name"),
    [
        ({"is_multilingual": False}, None, "english"),
        ({}, {}, "english"),
        ({}, None, "basic"),
        ({"is_multilingual": True}, {}, "basic"),
        ({"is_multilingual": True, "language": "<|en|>"}, {}, "english"),
        ({"is_multilingual": True, "language": "german"}, {}, "basic"),
    ],
)
def test_words_are_normalised_as_the_model_s_language_is(
    tmp_path: Path, generation: dict, spellings: dict | None, name: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if spellings is not None:
        (tmp_path / words.SPELLINGS).write_text(json.dumps({**spellings, "colour": "color"}))
    found = words.normaliser_of(tmp_path)
    assert found.name == name
    expected = "it is the color 21" if spellings is not None else "it is the colour 21"
    assert found.plain("Um, it's the colour twenty-one.") == (
        expected if name == "english" else "um it s the colour twenty one "
    )


def test_a_file_of_spellings_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / words.SPELLINGS).write_text('{"colour": 1}')
    with pytest.raises(UserError, match="expected words by words"):
        words.normaliser_of(tmp_path)


@needs_jiwer
def test_a_fold_is_measured_beside_what_is_said_and_what_its_original_writes(whisper: tuple[str, str, str]) -> None:
    model, fold, sounds = whisper
    same = headfold.eval(model, reference=model, text=sounds).measured
    assert same.wer == same.reference_wer > 0 and same.wer_to_reference == 0 and same.normaliser == "basic"
    found = headfold.eval(fold, reference=model, text=sounds).measured
    assert found.reference_wer == same.wer and found.wer is not None and found.nll != found.reference_nll
    none = headfold.eval(fold, reference=model, text=sounds, max_new_tokens=0).measured
    assert none.wer is None and none.nll == found.nll


@needs_jiwer
def test_a_context_cuts_labels_and_no_words_of_the_comparison(
    whisper: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, sounds = whisper
    transcripts = [file.read_text().strip() for file in sorted(Path(sounds).rglob("*.txt"))]
    compared, units = [], words.units
    monkeypatch.setattr(words, "units", lambda said, *rest: compared.append(list(said)) or units(said, *rest))
    headfold.eval(model, text=sounds, context=3)
    assert compared == [transcripts] and max(map(len, map(str.split, transcripts))) > 3


def test_recordings_longer_than_the_window_are_noted(run, whisper: tuple[str, str, str], tmp_path: Path) -> None:
    """Their end is not heard, and what is said there counts as wrong."""
    for name, seconds in (("long", 3), ("short", 1)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(100)
            file.writeframes(bytes(2 * 100 * seconds))
        (tmp_path / f"{name}.txt").write_text("a b")
    ran = run("eval", whisper[0], "--text", tmp_path, "--max-new-tokens", "0")
    assert ran.code == 0 and "1 of 2 recordings last longer than the model's 1 seconds" in ran.out, ran.err


@needs_jiwer
def test_folds_of_speech_are_compared(run, whisper: tuple[str, str, str]) -> None:
    model, fold, sounds = whisper
    rows = json.loads(run("eval", "--compare", model, fold, "--reference", model, "--text", sounds, "--json").out)
    assert [row["metric"] for row in rows] == ["nll", "nll", "wer", "wer", "wer_to_reference", "wer_to_reference"]
    assert rows[4]["value"] == 0 and {(row["units"], row["num_units"]) for row in rows} == {("recordings", 12)}


@pytest.mark.parametrize("words_of_command", [(), ("--compare",)])
def test_without_jiwer_the_loss_alone_is_measured_and_said(
    run,
    whisper: tuple[str, str, str],
    monkeypatch: pytest.MonkeyPatch,
    words_of_command: tuple[str, ...],
) -> None:
    monkeypatch.setattr(words, "is_installed", lambda: False)
    model, fold, sounds = whisper
    named = (model, fold) if words_of_command else (fold, "--reference", model)
    ran = run("eval", *named, "--text", sounds, *words_of_command)
    assert ran.code == 0 and words.NOT_INSTALLED in ran.out and "error rate  " not in ran.out, ran.err
