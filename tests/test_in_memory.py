"""Models in memory: a fold of one is the fold of its directory, on the same devices and in the same dtype, and leaves nothing behind."""

import copy
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from checkpoints import one_line
from grades import assert_bitwise
from test_corpus import tokenizer
from tiny import FOREIGN, readable_checkpoint, stock_model, tiny_checkpoint, tiny_sample, tiny_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from wrapped_models import seen_sample, wrapped_checkpoint

import headfold
from headfold.conversion.fold_result import FoldResult
from headfold.core.errors import UserError
from headfold.core.plan import Plan

__all__ = ["tokenizer"]
PLAIN: dict[str, Any] = {"merge": "mean", "group": "contiguous", "refit": False}
"""A fold without data."""
TEXTS = [f"def f{number}(x):\n    return x * {number}\n" * 6 for number in range(40)]


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever happens, the temporary directory is empty after it."""
    (tmp_path / "temporary").mkdir()
    made = partial(tempfile.mkdtemp, dir=tmp_path / "temporary")
    monkeypatch.setattr("headfold.in_memory.models.tempfile", SimpleNamespace(mkdtemp=made))
    yield
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.fixture
def readable(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path / "readable", tokenizer)


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return stock_model(tiny_checkpoint("llama", dtype), dtype)


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(tiny_tokens()).logits


def test_a_fold_in_memory_is_the_fold_of_the_directory(tmp_path: Path) -> None:
    """Bitwise, and the given model stays as it was."""
    model = llama().train()
    before, config = copy.deepcopy(model), json.dumps(model.config.to_dict(), default=str)
    folded = headfold.fold(model, kv_heads="1/2", **PLAIN)
    written = headfold.fold(tiny_checkpoint("llama", torch.float32), tmp_path / "out", kv_heads="1/2", **PLAIN)
    opened = headfold.load(tmp_path / "out")
    assert type(folded) is type(opened) and equal(folded, opened)
    assert_bitwise(logits(folded), logits(opened))
    # Its weights are its own, not parts of a file that was removed.
    assert "/temporary/headfold-" not in Path("/proc/self/maps").read_text()
    assert not folded.training and all(p.requires_grad for p in folded.parameters())
    assert model.training and equal(model, before) and json.dumps(model.config.to_dict(), default=str) == config
    result = folded.headfold
    assert result.verification.passed and result.plan.sites == written.plan.sites and result.out is None
    assert result.base_model == written.base_model == str(tiny_checkpoint("llama", torch.float32))
    assert result.to_json()["out"] is None and folded.name_or_path == folded.config.name_or_path == ""
    assert folded.generate(tiny_tokens(1, 4), max_new_tokens=3).shape == (1, 7)


def test_a_model_that_was_never_saved_is_folded(tmp_path: Path) -> None:
    """Its config names no class until then, and its name is that of its class."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(
        llama().config.__class__(**json.loads((tiny_checkpoint("llama") / "config.json").read_text()))
    )
    model.config.architectures = None
    assert headfold.fold(model, kv_heads=2, **PLAIN).headfold.base_model == "LlamaForCausalLM"
    assert model.config.architectures is None


def test_with_out_the_directory_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = headfold.fold(llama(), out, kv_heads=2, **PLAIN)
    assert isinstance(result, FoldResult) and result.out == out and headfold.load(out).config.num_key_value_heads == 2
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and "temporary" not in card


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_attention_are_those_of_the_model(dtype: torch.dtype) -> None:
    model = llama(dtype)
    model.set_attn_implementation("eager")
    folded = headfold.fold(model, kv_heads=2, **PLAIN)
    assert {p.dtype for p in folded.parameters()} == {dtype} and folded.config._attn_implementation == "eager"


def test_the_device_map_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate places the parts of a model, some of them away from where they run."""
    from accelerate import cpu_offload, dispatch_model

    plain, seen = headfold.fold(llama(), kv_heads=2, **PLAIN), []
    opened = headfold.in_memory.models.load
    monkeypatch.setattr(
        "headfold.in_memory.models.load", lambda *a, **k: seen.append(k.get("device_map")) or opened(*a, **k)
    )
    devices = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    placed = dispatch_model(llama(), devices, force_hooks=True)
    folded = headfold.fold(placed, kv_heads=2, **PLAIN)
    assert seen == [devices] and equal(folded, plain)
    offloaded = cpu_offload(llama(), execution_device="cpu")
    offloaded.hf_device_map = {"": "cpu"}
    assert equal(headfold.fold(offloaded, kv_heads=2, **PLAIN), plain)
    offloaded.hf_device_map = {"": "disk"}
    with pytest.raises(UserError) as error:
        headfold.fold(offloaded, kv_heads=2, **PLAIN)
    one_line(error, "lies on disk", "give out")


def test_steps_in_memory(tmp_path: Path, readable: Path, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: F811
    """Calibrate, plan and fold a model with data of the program, and measure the fold beside it."""
    model, stats = stock_model(readable, torch.float32), tmp_path / "stats.safetensors"
    data = {"tokens": 640, "context": 32}
    found = headfold.calibrate(model, stats, calibration=TEXTS, **data)
    assert found.source.startswith("python:list-") and found.tokens == 20 * 32
    plan = headfold.plan(model, kv_heads=2, stats=stats)
    assert isinstance(plan, Plan) and plan.calibration["source"] == found.source
    stepwise = headfold.fold(model, plan=plan, stats=stats)
    folded = headfold.fold(model, kv_heads=2, calibration=TEXTS, **data)
    assert equal(stepwise, folded) and stepwise.headfold.refitted
    again = headfold.calibrate(model, stats, calibration=iter(TEXTS), tokenizer=tokenizer, force=True, **data)
    assert again.source.startswith("python:list_iterator-") and again.tokens == found.tokens
    # The fold has no directory of its own: its tokenizer is that of the model that it was made of.
    text = {"text": TEXTS[:4], "context": 32}
    beside = headfold.eval(folded, reference=model, **text)
    out = tmp_path / "out"
    headfold.fold(model, out, kv_heads=2, calibration=TEXTS, **data)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in TEXTS[:4]))
    expected = headfold.eval(out, reference=readable, text=str(tmp_path / "text.jsonl"), context=32)
    assert beside.kl == expected.kl and beside.nll == expected.nll and beside.num_tokens == expected.num_tokens
    assert (beside.text, beside.model, beside.reference) == ("python:list", "fold-of-readable", str(readable))
    rows = [{"input_ids": tokenizer(one)["input_ids"][:20]} for one in TEXTS[:3]]
    assert headfold.eval(folded, reference=model, text=rows).num_tokens == 3 * 19
    ranked = headfold.eval(model, compare=[folded], text=rows, resamples=100)
    assert [row.verdict is None for row in ranked.rows] == [True, False]


def test_padded_batches_of_a_language_model(tmp_path: Path) -> None:
    """Texts of different lengths: what is measured does not see the padding."""
    tokens = tiny_tokens(12, 16)
    padded = torch.cat([torch.zeros(12, 5, dtype=torch.long), tokens], 1)
    mask = (torch.arange(21) >= 5).long().repeat(12, 1)
    mask[1::2, :9] = 0
    alone = [{"input_ids": row[seen.bool()][None]} for row, seen in zip(padded, mask, strict=True)]
    model, sums = llama(torch.float64), []
    for number, batches in enumerate((alone, [{"input_ids": padded, "attention_mask": mask}])):
        headfold.calibrate(model, tmp_path / f"{number}.safetensors", calibration=iter(batches))
        sums.append(headfold.stats_file.StatsFile(tmp_path / f"{number}.safetensors"))
    assert sums[0].metadata["kind"] == "texts" and sums[0].metadata == sums[1].metadata
    for site in sums[0]:
        assert sums[0][site].count == int(mask.sum())
        assert torch.equal(sums[0][site].tensors["second"], sums[1][site].tensors["second"])
    folded = headfold.fold(
        model, kv_heads=2, calibration=[{"input_ids": padded, "attention_mask": mask}], heal=True, heal_tokens=64
    )
    assert folded.headfold.verification.passed and folded.headfold.healed == 64


@pytest.mark.parametrize("name", ["t5", "whisper", "bert", "vit", "clip", "moonshine", "wav2vec2"])
def test_batches_of_every_kind(name: str) -> None:
    """The tensors of a loader calibrate and refit the kind of model that they are for."""
    model = stock_model(tiny_checkpoint(name, torch.float32), torch.float32)
    batches = [
        {key: t.float() if t.is_floating_point() else t for key, t in tiny_sample(name, 4, seed).items()}
        for seed in range(3)
    ]
    folded = headfold.fold(model, kv_heads="1/2", calibration=batches)
    result = folded.headfold
    assert result.verification.passed and result.refitted and result.plan.calibration["tokens"] == "12"
    assert result.num_kv_heads_after * 2 == result.num_kv_heads_before
    if FOREIGN[name].kind in ("pairs", "audio", "speech"):
        assert headfold.eval(folded, reference=model, text=batches).measured.num_items == 12


def test_padded_sound_of_an_encoder() -> None:
    """Statistics, refit and measure leave out the frames of padding."""
    model = stock_model(tiny_checkpoint("wav2vec2", torch.float32), torch.float32)
    sound = [{key: t.float() for key, t in tiny_sample("wav2vec2", 4, seed).items()} for seed in range(2)]
    mask = (torch.arange(sound[0]["input_values"].shape[1]) < 150).long().repeat(4, 1)
    folded = headfold.fold(model, kv_heads="1/2", calibration=[batch | {"attention_mask": mask} for batch in sound])
    assert folded.headfold.refitted and folded.headfold.verification.passed
    sound[1]["input_values"] = sound[1]["input_values"][:, :-20]
    assert headfold.eval(folded, reference=model, text=sound).measured.num_items == 8


def test_a_wrapper_is_calibrated_on_images_in_its_texts(tmp_path: Path) -> None:
    """As a loader gives them; the statistics, and a fold from them, say so."""
    model = stock_model(wrapped_checkpoint("llava", torch.float32), torch.float32)
    sample = {key: t.float() if t.is_floating_point() else t for key, t in seen_sample("llava").items()}
    batches, stats = [sample] * 12, tmp_path / "stats.safetensors"
    headfold.calibrate(model, stats, calibration=batches, items=9)
    measured = headfold.stats_file.StatsFile(stats)
    assert (measured.metadata["kind"], measured.metadata["tokens"]) == ("captions", "9")
    assert measured["layers.0.self"].count == 9 * sample["input_ids"].numel()
    headfold.calibrate(model, tmp_path / "blind", calibration=[{"input_ids": sample["input_ids"]}] * 9)
    blind = headfold.stats_file.StatsFile(tmp_path / "blind")["layers.0.self"].tensors["second"]
    assert (measured["layers.0.self"].tensors["second"] - blind).abs().max() > 1
    folded = headfold.fold(model, kv_heads=2, stats=stats).headfold
    assert folded.refitted and folded.verification.passed and folded.plan.calibration["kind"] == "captions"
    with pytest.raises(UserError) as error:
        headfold.eval(model, text=batches)
    one_line(error, "expected text alone, got pixel_values")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    model = llama()
    adapted = llama()
    adapted.model.layers[0].self_attn.q_proj = nn.ModuleDict({"base_layer": adapted.model.layers[0].self_attn.q_proj})
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (nn.DataParallel(model), {}, "got DataParallel; pass the model inside it"),
        (None, {}, "got NoneType"),
        (adapted, {}, "merge them first"),
        (tiny_checkpoint("llama"), {}, "expected an output directory"),
        (model, {"push_to_hub": "me/it"}, "give out as well"),
        (model, {"merge": "absorb", "group": "swap", "calibration": TEXTS}, "pass tokenizer="),
        (
            model,
            {"merge": "absorb", "calibration": [{"input_ids": torch.tensor([[1, 999]])}]},
            "expected tokens from 0",
        ),
    ]
    for given, options, words in refused:
        with pytest.raises(UserError) as error:
            headfold.fold(given, kv_heads=2, **PLAIN | options)
        one_line(error, words)
        assert "temporary" not in str(error.value), error.value
    with pytest.raises(UserError) as error:
        headfold.fold(tiny_checkpoint("llama"), tmp_path / "out", kv_heads=2, tokenizer=object(), **PLAIN)
    one_line(error, "beside a directory")
    assert not (tmp_path / "out").exists()


def test_errors_name_the_model_and_not_its_temporary_place() -> None:
    model = llama()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError) as error:
        headfold.fold(model, kv_heads=2, **PLAIN)
    one_line(error, "layers.1.self", "NaN")
    with pytest.raises(UserError) as lacking:
        headfold.calibrate(model, "stats.safetensors", calibration=["text"])
    one_line(lacking, f"{tiny_checkpoint('llama', torch.float32)}: expected a tokenizer", "pass tokenizer=")
    model.config.quantization_config = {"quant_method": "mine"}
    with pytest.raises(UserError) as quantised:
        headfold.fold(model, kv_heads=2, **PLAIN)
    one_line(quantised, f"{tiny_checkpoint('llama', torch.float32)}/config.json: quantised (mine)")
    assert all(words not in f"{error.value}{lacking.value}" for words in (f"temporary{os.sep}", "kept", ".partial"))


def test_data_that_are_not_kept_cannot_be_drawn_again(
    tmp_path: Path, readable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headfold.stats_file.SAMPLE_BYTES", 0)
    stats = tmp_path / "stats.safetensors"
    headfold.calibrate(readable, stats, calibration=TEXTS, tokens=512, context=32)
    with pytest.raises(UserError) as error:
        headfold.fold(readable, tmp_path / "out", kv_heads=2, stats=stats)
    one_line(error, "python:list-", "pass the same again")
    result = headfold.fold(
        readable, tmp_path / "out", kv_heads=2, stats=stats, calibration=TEXTS, tokens=512, context=32
    )
    assert result.refitted


def test_a_recipe_takes_data_of_the_program_from_the_statistics(
    tmp_path: Path, readable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names no data that only the program had; what a call names itself, it names too."""
    monkeypatch.chdir(tmp_path)
    headfold.calibrate(readable, "stats.safetensors", calibration=TEXTS, tokens=512, context=32)
    headfold.fold(readable, "out", kv_heads=2, stats="stats.safetensors", refit=False, verify=False)
    recipe, card = (tmp_path / "out" / "headfold.yaml").read_text(), (tmp_path / "out" / "README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("headfold fold ")]
    assert "python:" not in recipe + command and "tokens" not in recipe and "--stats stats.safetensors" in command
    headfold.run("out/headfold.yaml", "again", model=readable)
    for name in ("model.safetensors", "headfold.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    headfold.calibrate(
        readable, "stats.safetensors", calibration="text.txt", tokens=512, context=32, seed=3, force=True
    )
    for number, (named, options) in enumerate([({}, set()), ({"tokens": 256}, {"tokens", "context"})]):
        headfold.fold(
            readable, f"{number}", kv_heads=2, stats="stats.safetensors", verify=False, seed=3, **PLAIN, **named
        )
        fold = yaml.safe_load((tmp_path / f"{number}" / "headfold.yaml").read_text())["fold"]
        assert {"calibration", "tokens", "items", "columns", "context"} & fold.keys() == options


def test_there_must_be_room(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    full = shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr("headfold.in_memory.models.shutil.disk_usage", lambda path: full)
    with pytest.raises(UserError) as error:
        headfold.fold(llama(), kv_heads=2, **PLAIN)
    one_line(error, "too full", "TMPDIR")
