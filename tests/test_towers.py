"""Towers of wrappers: with `--encoder` they fold beside the language model, and what is folded is what their own class would compute."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import one_line
from grades import assert_bitwise, assert_differs, assert_tight_through_float32_norms
from safetensors.torch import load_file, save_file
from test_wrapped import config_of
from tiny import rewritten, stock_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from wrapped_models import WRAPPED, logits_of, seen_sample, wrapped_checkpoint

import headfold
from headfold.conversion.source import open_source
from headfold.core.equivalents import random_equivalent
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.heads import Heads
from headfold.core.plan import Plan, SitePlan
from headfold.families.layout import read_heads
from headfold.families.spec import Site
from headfold.merge.mean import merge as mean
from headfold.pages.folds import open_fold, open_original
from headfold.refine import fixed_attention
from headfold.stats_file import StatsFile

KINDS = {
    "clip": "llava", "siglip": "gemma3", "idefics": "smolvlm", "pixtral": "mistral3", "internvl": "internvl", "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl", "qwen2_audio": "qwen2_audio", "voxtral": "voxtral",
}  # fmt: skip
"""A wrapper for every kind of tower."""
EVERY_KIND = pytest.mark.parametrize("name", KINDS.values(), ids=KINDS.keys())
BASELINE: dict[str, Any] = dict(kv_heads="1/2", merge="mean", group="contiguous", refit=False, encoder=True)


def all_sites(directory: Path) -> list[tuple[Site, Heads]]:
    """The sites of the tower and of the language model, with their heads."""
    source = open_source(directory, encoder=True)
    return [(site, read_heads(site, source.checkpoint.read)) for site in source.sites]


def in_pairs(heads: Heads, _: int) -> Heads:
    """Neighbours share the mean of their K and V, written once for each of them."""
    groups = Groups.contiguous(heads.num_heads, heads.num_heads // 2)
    return mean(heads.to(torch.float64), groups).expand(heads.num_heads)


@EVERY_KIND
def test_tower_and_language_model_fold_together(name: str, tmp_path: Path) -> None:
    source, out, sample = wrapped_checkpoint(name), tmp_path / "out", seen_sample(name)
    result = headfold.fold(source, out, **BASELINE, calibration=[sample])
    assert result.verification is not None and result.verification.passed
    every_site = all_sites(source)
    stacks = {site.stack for site, _ in every_site}
    assert stacks == {"", "audio" if "audio_config" in config_of(source) else "vision"}
    assert result.plan.num_kv_heads == {site.name: heads.num_kv_heads // 2 for site, heads in every_site}

    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    theirs = {name for site, _ in every_site for name in site.parameters if not name.startswith(site.weights["o"])}
    assert before.keys() - theirs == after.keys() & before.keys() - theirs
    for tensor in before.keys() - theirs:
        assert_bitwise(after[tensor], before[tensor])
    assert config_of(out)["text_config"]["num_key_value_heads"] == 4
    listed = {site["module"] for site in config_of(out)["headfold"]["sites"]}
    assert listed == {site.module for site, _ in every_site if site.stack}

    twin = rewritten(source, tmp_path / "twin", in_pairs, every_site)
    said = logits_of(headfold.load(out), sample)
    assert_tight_through_float32_norms(said, logits_of(stock_model(twin), sample))
    blind = rewritten(source, tmp_path / "blind", in_pairs, [found for found in every_site if not found[0].stack])
    assert_differs(logits_of(stock_model(blind), sample), said)

    for attention in ("eager", "sdpa", "headfold"):
        model = headfold.load(out, attn_implementation=attention)
        assert_tight_through_float32_norms(logits_of(model, sample), said)
    auto = next(
        name for name, own in config_of(out)["auto_map"].items() if own.endswith(WRAPPED[name_of(out)].model_class)
    )
    brought = getattr(transformers, auto).from_pretrained(out, trust_remote_code=True, dtype=torch.float64).eval()
    assert type(brought).__module__.startswith("transformers_modules")
    assert_tight_through_float32_norms(logits_of(brought, sample), said)
    assert open_original(str(source), [open_fold(out, "out")]).costs["out"][1].weight_bytes > 0


def name_of(directory: Path) -> str:
    return config_of(directory)["model_type"]


@EVERY_KIND
def test_the_wrapper_cannot_see_what_key_freedom_allows_in_its_tower(name: str, tmp_path: Path) -> None:
    source, sample = wrapped_checkpoint(name), seen_sample(name)
    tower = [found for found in all_sites(source) if found[0].stack]
    equivalent = rewritten(source, tmp_path / "equivalent", random_equivalent, tower)
    expected = logits_of(stock_model(source), sample)
    assert_tight_through_float32_norms(logits_of(stock_model(equivalent), sample), expected)


REFITTED = pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mistral3", "qwen2_audio"])


def several(name: str, number: int) -> dict[str, torch.Tensor]:
    """As many different items."""
    sample = {key: torch.cat([tensor] * number) for key, tensor in seen_sample(name).items()}
    generator = torch.Generator().manual_seed(1)
    for key in sample.keys() & {"pixel_values", "input_features"}:
        sample[key] = torch.randn(sample[key].shape, dtype=torch.float64, generator=generator)
    return sample


@REFITTED
def test_a_refit_brings_the_tower_nearer_to_the_original(name: str, tmp_path: Path) -> None:
    """The language model keeps all its heads, so that nothing but the tower differs."""
    source, sample = wrapped_checkpoint(name), several(name, 24)
    headfold.calibrate(source, tmp_path / "stats.safetensors", calibration=[sample])
    sites = all_sites(source)
    measured = StatsFile(tmp_path / "stats.safetensors")
    assert {site.name for site, _ in sites} == set(measured)
    positions = {measured[site.name].count for site, _ in sites if site.stack}
    assert positions == {24 * (16 if name == "qwen2_vl" else 10 if name == "llava" else 9 if name == "mistral3" else 8)}
    planned = headfold.plan(source, kv_heads="1/2", encoder=True, stats=tmp_path / "stats.safetensors")
    language = {
        site.name: SitePlan(Groups.contiguous(heads.num_heads, heads.num_heads), "absorb", site.head_dim)
        for site, heads in sites
        if not site.stack
    }
    plan = Plan({**planned.sites, **language}, "contiguous", planned.source, 0, planned.calibration)
    expected = logits_of(stock_model(source), sample)
    errors = {}
    for refit in (False, True):
        out = tmp_path / f"refit-{refit}"
        found = headfold.fold(
            source, out, plan=plan, refit=refit, calibration=[sample], stats=tmp_path / "stats.safetensors"
        )
        assert found.verification is not None and found.verification.passed
        errors[refit] = (logits_of(headfold.load(out), sample) - expected).pow(2).mean().item()
    assert 0 < errors[True] < errors[False]


@pytest.mark.parametrize("how", ["model", "block"])
def test_a_tower_is_healed_where_the_last_layer_is_not_read(how: str, tmp_path: Path) -> None:
    healing = dict(heal=True, heal_by=how, heal_tokens=400)
    source, sample, options = wrapped_checkpoint("llava"), several("llava", 12), BASELINE | {"refit": True}
    result = headfold.fold(source, tmp_path / "out", **options, **healing, calibration=[sample])
    assert result.healed == 400 and result.verification is not None and result.verification.passed


OLDER = {
    "a component more": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "as in the model": lambda name: name.replace("language_model.model.", "model.language_model.").replace(
        "language_model.lm_head", "lm_head"
    ).replace("vision_tower.", "model.vision_tower.vision_model.").replace("multi_modal", "model.multi_modal"),
    "a base model": None,
}  # fmt: skip


@pytest.mark.parametrize("names", sorted(OLDER))
def test_names_on_disk_decide(names: str, tmp_path: Path) -> None:
    source, other, sample = wrapped_checkpoint("llava"), tmp_path / "source", seen_sample("llava")
    if rename := OLDER[names]:
        shutil.copytree(source, other)
        tensors = {rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
    else:
        stock_model(source).base_model.save_pretrained(other)
    found = headfold.fold(other, tmp_path / "out", **BASELINE, calibration=[sample]).verification
    assert found is not None and found.passed
    assert_bitwise(all_sites(other)[1][1].k, all_sites(source)[1][1].k)
    tower = [module for module in headfold.load(tmp_path / "out").modules() if hasattr(module, "headfold_site")]
    assert [module.k_proj.out_features for module in tower] == [12, 12]


def test_unequal_groups_in_tower_and_language_model(tmp_path: Path) -> None:
    """All sites are then listed, and those of Qwen2-VL's language model keep the forward of their class."""
    source, out, sample = wrapped_checkpoint("qwen2_vl"), tmp_path / "out", seen_sample("qwen2_vl")
    planned = headfold.fold(source, tmp_path / "even", **BASELINE, calibration=[sample]).plan
    uneven = SitePlan(Groups((0, 0, 0, 1, 1, 1, 1, 1)), "mean", 8)
    plan = Plan({**planned.sites, "layers.0.self": uneven}, "contiguous", planned.source, 0)
    found = headfold.fold(source, out, plan=plan, refit=False, calibration=[sample]).verification
    assert found is not None and found.passed and len(config_of(out)["headfold"]["sites"]) == 3
    types = [type(module).__name__ for module in headfold.load(out).modules() if hasattr(module, "headfold_site")]
    assert types == ["GroupedVisionAttention", "Qwen2VLAttention", "Qwen2VLAttention"]


def test_a_tower_of_several_calls_is_not_fitted_by_fixed_weights() -> None:
    """Qwen2-VL's asks for its attention once per image, and a fit that keeps the weights of one call would keep those of one image."""
    model: Any = stock_model(wrapped_checkpoint("qwen2_vl"))
    assert fixed_attention.install(copy.deepcopy(model.model.visual.blocks[0].attn)) is None
    assert fixed_attention.install(copy.deepcopy(model.model.language_model.layers[0].self_attn)) is not None


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "an unknown tower": (
        "llava", {"vision_config": {"model_type": "dinov2", "hidden_size": 24}},
        ("--encoder: vision_config: expected a tower of", "got 'dinov2'", "leave it out, and the language model alone is folded"),
    ),
    "a norm over all heads": ("internvl", {"use_qk_norm": True}, ("internvl_vision with use_qk_norm=True", "norm over all heads")),
    "other sizes": ("llava", {"num_hidden_layers": 3}, ("expects tensors that are not in the checkpoint", "layers.2")),
    "no data": ("llava", {}, ("--encoder: expected images with texts", "got no data", "--columns IMAGE,TEXT")),
    "text": ("llava", {"calibration": ["w1 w2 w3 " * 99]}, ("--encoder: expected images with texts", "got text")),
    "silence": ("voxtral", {}, ("--encoder: expected sound with texts", "got no data", "--columns AUDIO,TEXT")),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_folded_in_a_tower_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, changes, words = REFUSED[case]
    source, config = tmp_path / "source", config_of(wrapped_checkpoint(name))
    shutil.copytree(wrapped_checkpoint(name), source)
    data = {key: value for key, value in changes.items() if key == "calibration"}
    if tower := {key: value for key, value in changes.items() if key != "calibration"}:
        config["vision_config"] = tower.get("vision_config") or config["vision_config"] | tower
    (source / "config.json").write_text(json.dumps(config))
    tokenizer_of_words().save_pretrained(source)
    with pytest.raises(UserError) as refusal:
        headfold.fold(source, tmp_path / "out", **BASELINE, **data)
    one_line(refusal, *words)
    assert not (tmp_path / "out").exists()
    if case in ("no data", "text", "silence"):  # without the tower nothing is missing
        assert headfold.fold(source, tmp_path / "out", **(BASELINE | {"encoder": False}), **data).plan.num_kv_heads


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(60)}, "w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w1", unk_token="w0")


def test_plan_and_config_of_a_folded_tower_agree(tmp_path: Path) -> None:
    out, sample = tmp_path / "out", seen_sample("llava")
    headfold.fold(wrapped_checkpoint("llava"), out, **BASELINE, calibration=[sample])
    for where in ("tower", "language model"):
        config = config_of(out)
        if where == "tower":
            config["headfold"]["sites"][0]["kv_heads"] = 1
        else:
            config["text_config"]["num_key_value_heads"] = 2
        other = tmp_path / where
        shutil.copytree(out, other)
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as refusal:
            headfold.load(other)
        one_line(refusal, "one was changed after the fold")
