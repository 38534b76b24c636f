"""What the tower of a wrapper sees, from files: images and recordings with texts, and a fold of both models on them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from grades import assert_tight_through_float32_norms
from test_captions import captioned  # noqa: F401 (a fixture)
from test_illustrated import COLUMNS, llava  # noqa: F401 (a fixture)
from test_speech import recordings
from tiny import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor
from wrapped_models import SEEN, logits_of, seen_sample, wrapped_checkpoint

import headfold
from headfold import cli
from headfold.advice.commands import next_fold
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.corpus import illustrated
from headfold.corpus.samples import draw_sample
from headfold.hf_models import open_model

SOUND = ("audio", "text")


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-Audio with what stands before it."""
    path = tmp_path_factory.mktemp("audio") / "model"
    shutil.copytree(wrapped_checkpoint("qwen2_audio", torch.float32), path)
    words = ["<pad>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 3)), "<|AUDIO|>"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<|AUDIO|>"]
    )
    extractor = WhisperFeatureExtractor(feature_size=6, chunk_length=1, hop_length=1000, n_fft=2000)
    Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(path)
    return path


def test_the_command_folds_tower_and_language_model(
    llava: Path,  # noqa: F811
    captioned: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["headfold", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code
        return json.loads(capsys.readouterr().out)

    data = ("--calibration", captioned, "--columns", "image,caption", "--items", 32)
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    assert run("calibrate", llava, stats, *data)["sites"] == 4
    run("plan", llava, plan, "--kv-heads", "1/2", "--encoder", "--stats", stats)
    first = run("fold", llava, tmp_path / "first", "--plan", plan, "--stats", stats)
    second = run("fold", llava, tmp_path / "second", "--kv-heads", "1/2", "--encoder", *data)
    for result in (first, second):
        assert result["refitted"] and result["verification"]["passed"]
        assert (
            result["kv_bytes_after"] * 2 == result["kv_bytes_before"] == 2 * 2 * 8 * 8 * 4
        )  # of the language model alone
    files = [tmp_path / name / "model.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    card = (tmp_path / "second" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "--encoder" in card and "AutoProcessor" in card
    scores = run("eval", tmp_path / "second", "--reference", llava, "--limit", 50)
    assert scores["kv_bytes_per_token"] * 2 == scores["reference_kv_bytes_per_token"]
    run("run", tmp_path / "second" / "headfold.yaml", tmp_path / "again", "--model", llava)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == files[1].read_bytes()


def test_statistics_of_text_are_refused_for_a_tower(llava: Path, captioned: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "text.txt").write_text("a red square on grey\n\n" * 200)
    headfold.calibrate(llava, tmp_path / "stats", calibration=str(tmp_path / "text.txt"), tokens=64, context=32)
    for use in (
        lambda: headfold.plan(llava, kv_heads="1/2", encoder=True, stats=tmp_path / "stats"),
        lambda: headfold.fold(
            llava, tmp_path / "out", kv_heads="1/2", encoder=True, stats=tmp_path / "stats",
            calibration=str(captioned), columns=COLUMNS, items=8,
        ),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            use()
        one_line(error, tmp_path / "stats", "images with texts", "IMAGE,TEXT")
    assert headfold.plan(llava, kv_heads="1/2", stats=tmp_path / "stats").sites


def test_the_command_that_follows_a_plan_names_what_the_tower_sees(llava: Path) -> None:  # noqa: F811
    assert next_fold(open_source(llava, encoder=True), 2).endswith("--calibration SOURCE --columns IMAGE,TEXT")
    assert "--calibration" not in next_fold(open_source(llava), 2)


def test_sound_stands_in_its_text(hearing: Path, tmp_path: Path) -> None:
    source = recordings(tmp_path / "sounds", [0.5, 1.0, 0.75, 1.0])
    request = dict(path=hearing, num_items=4, context=64, seed=None, columns=SOUND)
    sample = draw_sample("spoken", source, **request)
    assert sample["input_features"].shape == (4, 6, 16) and sample["feature_attention_mask"].shape == (4, 16)
    assert ((sample["input_ids"] == SEEN).sum(1) == torch.tensor([2, 4, 3, 4])).all()
    data = dict(calibration=source, columns=SOUND, items=4)
    result = headfold.fold(hearing, tmp_path / "out", kv_heads="1/2", encoder=True, **data)
    assert result.verification is not None and result.verification.passed and len(result.plan.sites) == 3
    assert result.plan.calibration["kind"] == "spoken"
    with pytest.raises(UserError) as refusal:
        draw_sample("spoken", recordings(tmp_path / "unsaid", [1.0], written=False), **request)
    one_line(refusal, "--columns AUDIO,TEXT" if "expected sound" in str(refusal.value) else "text")


def test_a_processor_that_does_not_join_is_refused(llava: Path, hearing: Path, tmp_path: Path) -> None:  # noqa: F811
    source = recordings(tmp_path / "sounds", [0.5])
    with pytest.raises(UserError) as refusal:
        draw_sample("spoken", source, path=llava, num_items=1, context=64, seed=None, columns=SOUND)
    one_line(refusal, "expected a processor of audio and text together, got LlavaProcessor", "batches of its inputs")


def test_patches_of_one_image_are_one_row(captioned: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Qwen2-VL's processor gives the patches of all images as rows; the model takes them from a sample as from a user."""
    sample, model = seen_sample("qwen2_vl"), wrapped_checkpoint("qwen2_vl")
    sizes = iter([1, 1, 1, 2])

    def processor(images: Any, text: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        return sample | {"pixel_values": torch.cat([sample["pixel_values"]] * next(sizes))}

    monkeypatch.setattr(illustrated, "open_joint_processor", lambda path, beside: processor)
    request = dict(path=model, context=64, seed=None, columns=COLUMNS)
    drawn = draw_sample("captions", str(captioned), num_items=2, **request)
    assert drawn["pixel_values"].shape == (2, 16, 96) and drawn["image_grid_thw"].shape == (2, 3)
    opened = open_model(model)
    drawn["pixel_values"] = torch.cat([sample["pixel_values"][None]] * 2)
    assert_tight_through_float32_norms(logits_of(opened, drawn)[:1], logits_of(opened, sample))
    with pytest.raises(UserError) as refusal:
        draw_sample("captions", str(captioned), num_items=2, **request | {"path": model})
    one_line(refusal, "pixel_values: expected inputs of one size")
