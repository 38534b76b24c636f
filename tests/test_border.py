"""Damaged files from outside end in one line and exit code 2, before anything is built from them: the border of `core.json_input` and
`checkpoint.config`.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import by_layer, one_line, save, spoil_header, weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint, tiny_checkpoint
from torch import Tensor

import headfold
from headfold import cli
from headfold.checkpoint.reader import INDEX, Checkpoint
from headfold.core.errors import UserError
from headfold.core.json_input import MAX_DEPTH, parse, read_list, read_object
from headfold.evaluate import embedding
from headfold.evaluate.perplexity import LossComparison
from headfold.llama_cpp import pooling

# ruff: noqa: F811 - fixtures are arguments

WORDS = ("--kv-heads", "1/2", "--merge", "mean", "--group", "contiguous", "--no-refit")
"""A fold without data."""


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `headfold WORDS` in this process, which must refuse them in one line, and return the line."""

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["headfold", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("headfold: ")]
        assert left.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return call


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A copy of a tiny checkpoint whose config may be replaced."""
    made: dict[str, Path] = {}

    def copy(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("border") / name
            shutil.copytree(tiny_checkpoint(name, torch.float32), made[name])
        return made[name]

    return copy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"nested more than {MAX_DEPTH} deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
    ],
)  # fmt: skip
def test_json_beyond_its_bounds_is_refused_in_one_line(text: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse(text, "config.json")
    assert str(error.value).startswith("config.json: not valid JSON: ") and "\n" not in str(error.value)


def test_json_within_its_bounds_is_parsed() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(parse(deep, "x")).encode() == deep
    assert parse(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": 1000000000000000019884624838656}', "x") == {
        "a": "😀", "b": 1000000000000000019884624838656,
    }  # fmt: skip


def test_json_is_read_from_regular_files_of_the_expected_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, pipe = tmp_path / "a.json", tmp_path / "pipe"
    os.mkfifo(pipe)
    file.write_text("[1]")
    assert read_list(file) == [1]
    for path, words in ((pipe, "regular file"), (tmp_path, "regular file"), (file, "JSON object, got list")):
        with pytest.raises(UserError, match=words):
            read_object(path)
    monkeypatch.setattr("headfold.core.json_input.MAX_BYTES", 2)
    with pytest.raises(UserError, match="at most 2 bytes of JSON, got 3"):
        read_list(file)


def _put(config: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The config with a field, which may be one of a part (`text_config.hidden_size`)."""
    outer, _, inner = name.rpartition(".")
    return {**config, outer: {**config[outer], inner: value}} if outer else {**config, name: value}


COUNTS = (10**12, 0, -1, 2.5, True, "8", [], float("nan"))
FIELDS = [
    *(("llama", name, value) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size") for value in COUNTS),
    *(("llama", name, 10**12) for name in ("head_dim", "num_key_value_heads", "intermediate_size", "vocab_size", "num_labels")),
    *(("llama", "sliding_window", value) for value in (10**12, -1, 2.5, "8")),
    *(("llama", "max_position_embeddings", value) for value in (10**12, -1, 2.5, True, "8", [])),
    *(("llama", "intermediate_size", value) for value in (2**31 - 1, 0, None)),
    *(("llama", "rope_parameters", value) for value in ([1], "x", {"rope_theta": 0, "rope_type": "default"})),
    *(("llama", "rope_theta", value) for value in (0, -1, float("nan"), 10**39, "x")),
    *(("llama", "rope_scaling", {"rope_type": "linear", "factor": value, "rope_theta": 1e4}) for value in (0, float("inf"), "x")),
    *(("llama", name, value) for name in ("text_config", "auto_map", "headfold", "label2id") for value in ([], "x", 3)),
    ("llama", "quantization_config", "x"),
    ("llama", "rms_norm_eps", -1),
    ("llama", "layer_types", ["full_attention"]),
    ("llama", "layer_types", "full_attention"),
    ("llama", "tie_word_embeddings", "no"),
    ("llama", "dtype", "float99"),
    ("llama", "model_type", ["llama"]),
    ("llama", "model_type", {"llama": 1}),
    ("llama", "model_type", "\ud800"),
    ("llama", "architectures", "LlamaForCausalLM"),
    ("llama", "hidden_act", None),
    ("llama", "hidden_act", "no-such"),
    ("llama", "use_cache", "x"),
    ("llama", "num_attention_heads", 10**50),
    ("mixtral", "num_local_experts", 10**6),
    ("qwen2", "partial_rotary_factor", 2),
    ("t5", "num_layers", 10**12),
    ("t5", "d_kv", 10**9),
    ("t5", "num_decoder_layers", 2.5),
    ("t5", "vocab_size", 2**31 - 1),
    ("gpt2", "n_head", True),
    ("gpt2", "n_positions", 2**31 - 1),
    ("gpt2", "activation_function", 3),
    ("gpt_neo", "attention_types", [[["global", "local"], 10**12]]),
    ("vit", "image_size", 10**12),
    ("vit", "patch_size", 0),
    ("vit", "image_size", [12]),
    ("clip", "text_config.num_hidden_layers", 10**12),
    ("clip", "vision_config", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
def test_a_damaged_field_of_the_config_is_refused_before_anything_is_written(
    checkpoints: Callable[[str], Path], refused: Callable[..., str], tmp_path: Path, name: str, field: str, value: Any
) -> None:
    model = checkpoints(name)
    config = json.loads((tiny_checkpoint(name, torch.float32) / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(_put(config, field, value)))
    line = refused("fold", model, tmp_path / "out", *WORDS)
    assert "config" in line and len(line) < 900
    assert not [*tmp_path.iterdir()]


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


def _entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["model.norm.weight"].update(fields)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a shape of floats": _entry(shape=[48.0]),
    "a shape of true": lambda header: header.update(flag={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}),
    "a negative shape": _entry(shape=[-6, -8]),
    "a shape that is a text": _entry(shape="48"),
    "a dtype that is none": _entry(dtype=["F32"]),
    "offsets that are floats": lambda header: header["model.norm.weight"].update(
        data_offsets=[*map(float, header["model.norm.weight"]["data_offsets"])]
    ),
    "three offsets": _entry(data_offsets=[0, 1, 2]),
    "metadata that is no object": lambda header: header.update(__metadata__=["pt"]),
    "metadata that is no text": lambda header: header.update(__metadata__={"format": 1}),
    "a number that is none": _entry(unknown=float("nan")),
    "half a surrogate pair": lambda header: header.update({"\ud800": header.pop("model.norm.weight")}),
}  # fmt: skip


@pytest.mark.parametrize("change", HEADERS.values(), ids=[*HEADERS])
def test_a_header_that_safetensors_refuses_is_refused(
    refused: Callable[..., str], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "model"))
    spoil_header(model / "model.safetensors", change)
    with pytest.raises(SafetensorError), safe_open(model / "model.safetensors", "pt"):
        pass
    line = refused("fold", model, tmp_path / "out", *WORDS, "--no-verify")
    assert "model.safetensors" in line and "corrupt safetensors header" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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


@pytest.fixture(scope="module")
def measured(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its statistics."""
    place = tmp_path_factory.mktemp("measured")
    model = readable_checkpoint(place / "model", tokenizer)
    (place / "text.txt").write_text("the quick brown fox\n" * 200)
    headfold.calibrate(model, place / "stats.safetensors", calibration=str(place / "text.txt"), tokens=256, context=32)
    return model, place / "stats.safetensors"


@pytest.mark.parametrize("part", ["", "text_config"])
def test_more_layers_than_a_checkpoint_has_tensors_are_refused(tmp_path: Path, part: str) -> None:
    path = save(tmp_path / "source", weights(torch.float32), None)
    layers = {"num_hidden_layers": 2000}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **({part: layers} if part else layers)}))
    with pytest.raises(UserError, match=r"num_hidden_layers: expected no more layers than .* tensors \(19\), got 2000"):
        Checkpoint.open(path)


@pytest.mark.parametrize("metadata", [[1], {"total_size": 1, "total_parameters": "x"}, {"total_parameters": True}])
def test_damaged_facts_of_an_index_are_refused(tmp_path: Path, metadata: Any) -> None:
    path = save(tmp_path / "source", weights(torch.float32), by_layer)
    index = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    with pytest.raises(UserError, match="expected metadata with whole numbers") as error:
        Checkpoint.open(path)
    one_line(error, INDEX)


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


def test_a_loss_beyond_every_float_has_an_infinite_perplexity() -> None:
    scores = LossComparison(1, 800.0, (800.0,), 1.0, reference_nll=709.0)
    assert scores.perplexity == math.inf and scores.reference_perplexity == math.exp(709)
