"""Damaged plans, statistics and tokenizers end in one line and exit code 2, before anything is built from them."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_border import WORDS, refused  # noqa: F401 (a fixture)
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint, tiny_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import ViTImageProcessor, WhisperFeatureExtractor

import headfold
from headfold.conversion.fitted_sites import FittedSites
from headfold.core.errors import UserError
from headfold.core.fitted import FittedHeads
from headfold.corpus import jsonl
from headfold.corpus.samples import random_tokens
from headfold.evaluate import embedding
from headfold.exports.pieces import picked
from headfold.hf_models import open_processor, open_tokenizer
from headfold.hf_models.building import library_errors
from headfold.llama_cpp import pooling, tokens
from headfold.stats_file import StatsFile

# ruff: noqa: F811 - fixtures are arguments


def _plan_site(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["sites"]["layers.1.self"].update(fields)


PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a head of 10**9": _plan_site(kv_of_source_head=[0, 0, 0, 0, 0, 0, 0, 10**9]),
    "a negative head": _plan_site(kv_of_source_head=[0, 0, 0, 0, 0, 0, 0, -1]),
    "a group without heads": _plan_site(kv_of_source_head=[0, 0, 0, 0, 0, 0, 0, 2]),
    "heads that are true": _plan_site(kv_of_source_head=[False, False, False, False, True, True, True, True]),
    "heads that are texts": _plan_site(kv_of_source_head=["0"] * 8),
    "heads of another count": _plan_site(kv_of_source_head=[0] * 10_000),
    "no heads": _plan_site(kv_of_source_head=[]),
    "heads in an object": _plan_site(kv_of_source_head={"0": 1}),
    "no energy": _plan_site(error={"key": 0, "value": 0}, energy={"key": 0, "value": 1}),
    "an error that is not finite": _plan_site(error={"key": float("nan"), "value": 0}),
    "an error that is a text": _plan_site(error={"key": "x", "value": 0}),
    "a large head_dim": _plan_site(head_dim=10**12),
    "a head_dim that is none": _plan_site(head_dim=True),
    "a merge that is none": _plan_site(merge="no-such"),
    "a merge of another type": _plan_site(merge=3),
    "another format": lambda plan: plan.update(format=[1]),
    "no sites": lambda plan: plan.update(sites={}),
    "a list of sites": lambda plan: plan.update(sites=[]),
    "a seed that is a text": lambda plan: plan.update(seed="x"),
    "facts of another type": lambda plan: plan.update(calibration={"tokens": 3}),
    "facts that are no numbers": lambda plan: plan.update(calibration={"source": "self", "tokens": "x", "seed": "0"}),
    "facts that lack the context": lambda plan: plan.update(calibration={"source": "self", "tokens": "9", "seed": "0"}),
}  # fmt: skip


@pytest.mark.parametrize("change", PLANS.values(), ids=[*PLANS])
def test_a_damaged_plan_is_refused_before_anything_is_written(
    refused: Callable[..., str], plan_of_llama: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    plan = json.loads(plan_of_llama.read_text())
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    line = refused(
        "fold",
        tiny_checkpoint("llama", torch.float32),
        tmp_path / "out",
        "--plan",
        tmp_path / "plan.json",
        "--no-refit",
    )
    assert "plan" in line or "--merge" in line or "no-such" in line
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.fixture(scope="module")
def plan_of_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    headfold.plan(tiny_checkpoint("llama", torch.float32), out, kv_heads=2, group="contiguous", merge="mean")
    return out


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, metadata: tensors.update({name: change(tensors[name])})


def _counts(value: Any) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        counts = json.loads(metadata["headfold.counts"])
        metadata["headfold.counts"] = (
            value if isinstance(value, str) else json.dumps({**counts, "layers.1.self": value})
        )

    return change


def _fact(**fields: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, metadata: metadata.update(fields)


SECOND, SCATTER, ATTENDED = (f"layers.1.self/{name}" for name in ("second", "scatter", "attended"))
STATS: dict[str, Callable[[dict[str, Tensor], dict[str, str]], object]] = {
    **{f"a count of {value}": _counts(value) for value in (-1, 0, 2.5, True, None, 2**63)},
    "counts that are a list": _counts("[1]"),
    "counts that are no JSON": _counts("{"),
    "counts nested deep": _counts("[" * 100_000),
    "no second moment": lambda tensors, metadata: tensors.pop(SECOND),
    "a second moment that is not finite": _tensor(SECOND, lambda total: total * torch.nan),
    "a second moment too large to multiply": _tensor(SECOND, lambda total: total.double() * 1e200),
    "a second moment below zero": _tensor(SECOND, lambda total: -total),
    "a second moment of integers": _tensor(SECOND, lambda total: total.long()),
    "a second moment of another shape": _tensor(SECOND, lambda total: total[:-1].contiguous()),
    "a vector": _tensor(SCATTER, lambda total: total[0].contiguous()),
    "a mass of attention below zero": _tensor(ATTENDED, lambda total: -1 - total),
    "a mass of attention of another shape": _tensor(ATTENDED, lambda total: total[:1].contiguous()),
    "another sample": _tensor("sample/input_ids", lambda ids: ids + 1),
    "tokens that are no number": lambda tensors, metadata: (tensors.pop("sample/input_ids"), metadata.update(tokens="x")),
    "no context": lambda tensors, metadata: (tensors.pop("sample/input_ids"), metadata.pop("context")),
    "a seed that is no number": lambda tensors, metadata: (tensors.pop("sample/input_ids"), metadata.update(seed="-1")),
}  # fmt: skip


@pytest.mark.parametrize("change", STATS.values(), ids=[*STATS])
def test_damaged_statistics_are_refused(
    refused: Callable[..., str], measured: tuple[Path, Path], tmp_path: Path, change: Callable[[Any, Any], object]
) -> None:
    model, stats = measured
    with safe_open(stats, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(stats)
    change(tensors, metadata)
    save_file(tensors, tmp_path / "stats.safetensors", metadata)
    line = refused("fold", model, tmp_path / "out", "--kv-heads", 2, "--stats", tmp_path / "stats.safetensors")
    assert "stats" in line or "statistics" in line


def test_a_scatter_may_be_below_zero_by_rounding(measured: tuple[Path, Path], tmp_path: Path) -> None:
    """As that of texts of one token, which is a difference of equal sums."""
    stats = tmp_path / "stats.safetensors"
    with safe_open(measured[1], "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(measured[1])
    tensors[SCATTER] = torch.full_like(tensors[SCATTER], -1e-9)
    save_file(tensors, stats, metadata)
    assert_bitwise(StatsFile(stats)["layers.1.self"].tensors["scatter"], tensors[SCATTER])


@pytest.fixture(scope="module")
def measured(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its statistics."""
    place = tmp_path_factory.mktemp("measured")
    model = readable_checkpoint(place / "model", tokenizer)
    (place / "text.txt").write_text("the quick brown fox\n" * 200)
    headfold.calibrate(model, place / "stats.safetensors", calibration=str(place / "text.txt"), tokens=256, context=32)
    return model, place / "stats.safetensors"


@pytest.mark.parametrize(
    "modules",
    ["{}", "[3]", '[{"type": "Pooling"}]', '[{"type": "Pooling", "path": "../x"}]', '[{"type": 1, "path": ""}]', "["],
)
def test_damaged_steps_of_a_sentence_encoder_are_refused(tmp_path: Path, modules: str) -> None:
    (tmp_path / "modules.json").write_text(modules)
    for read in (embedding.pooling_of, pooling.pooling_of):
        with pytest.raises(UserError, match=r"modules\.json"):
            read(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    refused: Callable[..., str], measured: tuple[Path, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(measured[0], tmp_path / "model"))
    for file in tiny_checkpoint("llama", torch.float32, vocab_size=9).iterdir():
        shutil.copy(file, model)
    text = measured[0].parent / "text.txt"
    for words in (
        ("calibrate", model, tmp_path / "stats", "--calibration", text, "--tokens", 64, "--context", 16),
        ("eval", model, "--text", text, "--context", 16),
        ("fold", model, tmp_path / "out", *WORDS),
    ):
        assert "expected tokens from 0 to 8, the rows of its embedding" in refused(*words)


@pytest.mark.parametrize("number", [2**31, 10**12, -1, 2.5, "8", None])
def test_ids_that_no_vocabulary_has_are_refused(number: object, measured: tuple[Path, Path], tmp_path: Path) -> None:
    """The tokenizers library takes memory for all ids up to the greatest one."""
    file = Path(shutil.copytree(measured[0], tmp_path / "model")) / "tokenizer.json"
    found = json.loads(file.read_text())
    for part in ("vocab", "added"):
        changed = json.loads(json.dumps(found))
        if part == "vocab":
            changed["model"]["vocab"][next(iter(changed["model"]["vocab"]))] = number
        else:
            changed["added_tokens"] = [{"id": number, "content": "x"}]
        file.write_text(json.dumps(changed))
        for read in (open_tokenizer, tokens._read):
            with pytest.raises(UserError, match=rf"tokenizer.json: expected ids .* got {number!r}"):
                read(tmp_path / "model")


@pytest.mark.parametrize("longest", ["8", 0, -1, True, [3]])
def test_a_longest_text_that_is_no_number_is_refused(
    longest: object, measured: tuple[Path, Path], tmp_path: Path
) -> None:
    file = Path(shutil.copytree(measured[0], tmp_path / "model")) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": longest}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: model_max_length|tokenizer does not load"):
        open_tokenizer(tmp_path / "model")


def test_a_processor_of_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    for name, processor, size in (
        ("vit", ViTImageProcessor(size={"height": 14, "width": 12}), "(12, 12), got (14, 12)"),
        ("dinov2", ViTImageProcessor(size={"height": 14, "width": 12}), ""),
        ("whisper", WhisperFeatureExtractor(feature_size=7), "(6, 22), got (7, 3000)"),
    ):
        place = Path(shutil.copytree(tiny_checkpoint(name, torch.float32), tmp_path / name))
        processor.save_pretrained(place)
        kind = "audio" if name == "whisper" else "images"
        if size:
            with pytest.raises(UserError, match=re.escape(f"of the model's size {size}")):
                open_processor(kind, place)
        else:  # its positions are interpolated
            open_processor(kind, place)


def test_a_processor_that_divides_by_zero_is_refused(tmp_path: Path) -> None:
    place = Path(shutil.copytree(tiny_checkpoint("vit", torch.float32), tmp_path / "vit"))
    ViTImageProcessor(size={"height": 12, "width": 12}, image_std=[1.0, 0.0, 1.0]).save_pretrained(place)
    with pytest.raises(UserError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        open_processor("images", place)
    one_line(error, place / "preprocessor_config.json", "finite pixels", "image_std")


def test_what_a_library_quotes_can_be_printed() -> None:
    with pytest.raises(UserError) as error, library_errors("config.json", "does not load"):
        raise ValueError("half of a pair: \ud800\nand more")
    assert str(error.value).encode() == b"config.json: does not load: half of a pair: \\ud800 and more"


def test_damaged_heads_of_an_earlier_run_are_named(tmp_path: Path) -> None:
    sites = FittedSites(tmp_path / "fitted")
    sites.put("layers.0.self", FittedHeads(o=torch.zeros(2, 3, 4)), {"model": "x"})
    file = tmp_path / "fitted" / "layers.0.self.safetensors"
    for data in (file.read_bytes()[:-1], b""):
        file.write_bytes(data)
        with pytest.raises(
            UserError, match=r"layers\.0\.self\.safetensors: expected the fitted heads of an earlier run"
        ):
            FittedSites(tmp_path / "fitted")["layers.0.self"]
        with pytest.raises(UserError, match="expected the fitted heads"):
            FittedSites(tmp_path / "fitted").facts  # noqa: B018


def test_a_tokenizer_whose_unknown_token_is_none_is_refused(measured: tuple[Path, Path], tmp_path: Path) -> None:
    """It loads, and fails at the first text that has it."""
    model = Path(shutil.copytree(measured[0], tmp_path / "model"))
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
    words.save(str(model / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer refuses a text: .*is its unknown token in its vocabulary"):
        open_tokenizer(model)


def test_half_a_surrogate_pair_in_data_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "half \\ud83d", "meta": "\\udc00"}\n')
    assert [*jsonl.documents(tmp_path / "lines.jsonl")] == ["half ?"]


def test_a_class_that_transformers_lacks_is_folded_where_nothing_is_run(tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForRewardModel"]}))
    how: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False)
    headfold.fold(model, tmp_path / "out", **how, verify=False)
    with pytest.raises(UserError, match="LlamaForRewardModel"):
        headfold.fold(model, tmp_path / "other", **how)


def test_sizes_that_the_config_and_the_tensors_do_not_share_are_refused() -> None:
    with pytest.raises(UserError, match="4 blocks of 3"):
        picked(torch.zeros(6, 2), [0, 3, 4], 3, 0)
    assert picked(torch.ones(6, 2), [0, 2], 3, 0).sum() == 6  # one past the last is zeros
    with pytest.raises(UserError, match="expected vocab_size, got none"):
        random_tokens({}, 1, 2)
