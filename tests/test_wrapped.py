"""Wrappers: their language model folds where it is, and all else stays as it was, byte for byte."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import one_line
from grades import assert_bitwise, assert_differs, assert_tight_through_float32_norms
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import rewritten, stock_model, tiny_sites, tiny_tokens
from wrapped_models import WRAPPED, logits_of, seen_sample, wrapped_checkpoint

import headfold
from headfold import cli, hf_models
from headfold.advice.demand import demands
from headfold.conversion.source import open_source
from headfold.core.equivalents import random_equivalent
from headfold.core.errors import UserError
from headfold.core.heads import KeyFreedom
from headfold.families.context import context_length
from headfold.families.old_names import with_old_names
from headfold.families.wrapped import WRAPPERS, language_config
from headfold.train.sites import find_sites

EVERY_WRAPPER = pytest.mark.parametrize("name", sorted(WRAPPED))
BASELINE: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False)
TEXT = {"input_ids": tiny_tokens(1, 12) % 60}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def changed(source: Path, target: Path, config: dict[str, Any]) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_every_wrapper_has_a_tiny_model_and_is_what_its_class_says() -> None:
    assert WRAPPED.keys() == WRAPPERS.keys()
    for name, wrapper in WRAPPERS.items():
        default = transformers.CONFIG_MAPPING[name]()
        assert default.model_type == name and default.text_config.model_type == wrapper.inner, name


@EVERY_WRAPPER
def test_the_language_model_folds_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    source, out = wrapped_checkpoint(name), tmp_path / "out"
    sample = seen_sample(name) if WRAPPED[name].seen else TEXT
    result = headfold.fold(source, out, **BASELINE)
    assert result.verification is not None and result.verification.passed
    sites = tiny_sites(source)
    assert [site.name for site, _ in sites] == ["layers.0.self", "layers.1.self"]

    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    halved = {site.tensor(role) for site, _ in sites for role in "kv"}
    halved |= {f"{site.weights[role]}.bias" for site, _ in sites for role in "kv" if role in site.biases}
    assert before.keys() == after.keys()
    for tensor in before:
        if tensor in halved:
            assert len(after[tensor]) * 4 == len(before[tensor])
        else:
            assert_bitwise(after[tensor].reshape(-1), before[tensor].reshape(-1))
    old, new = config_of(source), config_of(out)
    assert new == old | {"text_config": with_old_names(old["text_config"]) | {"num_key_value_heads": 2}}

    model = stock_model(out)
    for site, heads in tiny_sites(out):
        assert model.get_submodule(site.module).num_key_value_groups == heads.num_heads // heads.num_kv_heads == 4
    places = [(site.module, site.paths["o"]) for site, _ in tiny_sites(out)]
    assert [(place.module, place.output) for place in find_sites(model)] == places
    twin = rewritten(out, tmp_path / "twin", lambda heads, _: heads.expand(8))
    said = logits_of(model, sample)
    assert_tight_through_float32_norms(logits_of(stock_model(twin), sample), said)
    assert_differs(logits_of(stock_model(source), sample), said)


@EVERY_WRAPPER
def test_the_wrapper_cannot_see_what_key_freedom_allows(name: str, tmp_path: Path) -> None:
    source = wrapped_checkpoint(name)
    sample = seen_sample(name) if WRAPPED[name].seen else TEXT
    equivalent = rewritten(source, tmp_path / "equivalent", lambda heads, index: random_equivalent(heads, index))
    expected = logits_of(stock_model(source), sample)
    assert_tight_through_float32_norms(logits_of(stock_model(equivalent), sample), expected)


def test_positions_of_three_coordinates_leave_no_more_free_than_those_of_one(tmp_path: Path) -> None:
    """Text has three equal coordinates, so that this is seen on an image alone."""
    source, sample = wrapped_checkpoint("qwen2_vl"), seen_sample("qwen2_vl")
    freer = KeyFreedom("any")
    other = rewritten(
        source,
        tmp_path / "other",
        lambda heads, index: random_equivalent(type(heads)(**{**_fields(heads), "key_freedom": freer}), index),
    )
    assert_differs(logits_of(stock_model(other), sample), logits_of(stock_model(source), sample))


def _fields(heads: Any) -> dict[str, Any]:
    return {name: getattr(heads, name) for name in heads.__dataclass_fields__}


RENAMED = {
    "as in the model": lambda name: name.replace("language_model.model.", "model.language_model.").replace(
        "language_model.lm_head", "lm_head"
    ).replace("vision_tower.", "model.vision_tower.").replace("multi_modal", "model.multi_modal"),
    "a base model": None,
}  # fmt: skip


@pytest.mark.parametrize("names", sorted(RENAMED))
def test_names_on_disk_decide(names: str, tmp_path: Path) -> None:
    source, other = wrapped_checkpoint("llava"), tmp_path / "source"
    if rename := RENAMED[names]:
        changed(source, other, config_of(source))
        tensors = {rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
    else:
        stock_model(source).base_model.save_pretrained(other)
    found = headfold.fold(other, tmp_path / "out", **BASELINE).verification
    assert found is not None and found.passed
    assert_bitwise(tiny_sites(other)[1][1].k, tiny_sites(source)[1][1].k)
    modules = dict(stock_model(tmp_path / "out").named_modules())
    assert all(site.module in modules for site, _ in tiny_sites(tmp_path / "out"))


def test_what_a_config_leaves_out_is_what_its_class_assumes(tmp_path: Path) -> None:
    config = config_of(wrapped_checkpoint("gemma3", num_key_value_heads=4))
    for field in ("num_attention_heads", "num_key_value_heads", "model_type"):
        del config["text_config"][field]
    source = changed(wrapped_checkpoint("gemma3", num_key_value_heads=4), tmp_path / "source", config)
    assert headfold.inspect(source).num_kv_heads == 4
    headfold.fold(source, tmp_path / "out", **BASELINE)
    assert config_of(tmp_path / "out")["text_config"]["num_key_value_heads"] == 2
    assert "num_attention_heads" not in config_of(tmp_path / "out")["text_config"]
    assert stock_model(tmp_path / "out").config.text_config.num_key_value_heads == 2


def test_fields_beside_those_of_the_wrapper_stay_there(tmp_path: Path) -> None:
    """Qwen2-VL was published with one flat config."""
    config = config_of(wrapped_checkpoint("qwen2_vl"))
    flat = {**config.pop("text_config"), **config}
    source = changed(wrapped_checkpoint("qwen2_vl"), tmp_path / "source", flat)
    assert context_length(flat) == 64
    found = headfold.fold(source, tmp_path / "out", **BASELINE).verification
    assert found is not None and found.passed
    made = config_of(tmp_path / "out")
    assert (made["model_type"], made["num_key_value_heads"], "text_config" in made) == ("qwen2_vl", 2, False)
    headfold.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "voxtral"])
def test_a_wrapper_larger_than_memory_is_read_as_it_runs(name: str) -> None:
    path = wrapped_checkpoint(name)
    streamed, whole = (hf_models.open_model(path, memory_limit=limit) for limit in (0, None))
    assert all(parameter.is_meta for parameter in streamed.parameters())
    assert_bitwise(logits_of(streamed, TEXT), logits_of(whole, TEXT))
    if name != "voxtral":  # its tower asks a weight for the device of its inputs
        sample = seen_sample(name)
        assert_tight_through_float32_norms(logits_of(streamed, sample), logits_of(whole, sample))


def test_unequal_groups_run_in_the_wrapper(tmp_path: Path) -> None:
    source, out, sample = wrapped_checkpoint("llava"), tmp_path / "out", seen_sample("llava")
    found = headfold.fold(source, out, kv_heads=3, merge="mean", group="kmeans:cost=wse", refit=False).verification
    assert found is not None and found.passed
    config = config_of(out)
    assert len(config["headfold"]["sites"]) == 2 and "headfold" not in config["text_config"]
    model = headfold.load(out)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    brought = transformers.AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    brought.set_attn_implementation("headfold")
    assert_tight_through_float32_norms(logits_of(brought, sample), logits_of(model, sample))
    written = [one.generate(**sample, max_new_tokens=3, do_sample=False) for one in (model, brought)]
    assert torch.equal(*written)


def test_a_wrapper_is_calibrated_refitted_and_measured_on_text(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],  # noqa: F811
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(wrapped_checkpoint("llava", torch.float32, vocab_size=len(tokenizer)), source)
    tokenizer.save_pretrained(source)

    def run(*words: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["headfold", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code
        return json.loads(capsys.readouterr().out)

    run("calibrate", source, tmp_path / "stats.safetensors", "--tokens", 512, "--context", 32)
    run("plan", source, tmp_path / "plan.json", "--kv-heads", 2, "--stats", tmp_path / "stats.safetensors")
    result = run("fold", source, out, "--plan", tmp_path / "plan.json", "--stats", tmp_path / "stats.safetensors")
    assert result["refitted"] and result["verification"]["passed"] and result["family"] == "llava"
    scores = run("eval", out, "--reference", source, "--limit", 200)
    assert scores["kv_bytes_per_token"] * 4 == scores["reference_kv_bytes_per_token"] == 2 * 2 * 8 * 8 * 4


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no inner config": ({"text_config": None}, ("text_config: expected the config of the language model", "llava")),
    "no object": ({"text_config": [3]}, ("text_config: expected a JSON object, got [3]",)),
    "a vision model": ({"text_config": {"model_type": "clip_vision_model"}}, ("text_config", "clip_vision_model")),
    "no count": ({"text_config": {"model_type": "opt"}}, ("whose class reads a count of K/V heads, got 'opt'",)),
    "unknown": ({"text_config": {"model_type": "lama"}}, ("wraps a 'lama' text model", "did you mean llama")),
    "no wrapper": ({"model_type": "llavva"}, ("'llavva' wraps a 'llama' text model", "llava_next")),
    "two towers": ({"model_type": "see_and_hear", "text_config": None, "audio_config": {}}, ("see_and_hear",)),
    "two layers more": ({"text_config": {"model_type": "llama"}}, ("that are not in the checkpoint",)),
    "tower": ({"audio_config": 3}, ("audio_config: expected a JSON object, got 3",)),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_no_wrapper_of_a_language_model_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    source = changed(wrapped_checkpoint("llava"), tmp_path / "source", config_of(wrapped_checkpoint("llava")) | changes)
    with pytest.raises(UserError) as refusal:
        headfold.fold(source, tmp_path / "out", **BASELINE)
    one_line(refusal, *words)
    assert not (tmp_path / "out").exists()


def test_a_new_token_reads_the_language_model_alone() -> None:
    source = open_source(wrapped_checkpoint("llava"))
    read = next(iter(demands(source))).dense_bytes
    tensors = {name: info for name, info in source.checkpoint.tensors.items() if name.startswith("language_model.")}
    table = tensors.pop("language_model.model.embed_tokens.weight")
    sizes = [torch.Size(info.shape).numel() * info.dtype.itemsize for info in tensors.values()]
    assert table.shape[0] == 61 and read == sum(sizes)


def test_any_other_config_is_its_own() -> None:
    config = {"model_type": "clip", "text_config": {"hidden_size": 3}}
    assert language_config(config) is config
