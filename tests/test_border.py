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
from tiny import tiny_checkpoint
from torch import Tensor

import headfold
from headfold import cli
from headfold.checkpoint.cards import read_card
from headfold.checkpoint.reader import INDEX, Checkpoint
from headfold.core.errors import UserError, suggest
from headfold.core.json_input import MAX_DEPTH, parse, read_list, read_object
from headfold.evaluate.perplexity import LossComparison

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
    *(("llama", "sliding_window", value) for value in (10**12, -2, 2.5, "8")),
    *(("llama", "max_position_embeddings", value) for value in (10**12, -1, 2.5, True, "8", [])),
    *(("llama", "intermediate_size", value) for value in (2**31 - 1, 0, None)),
    *(("llama", "rope_parameters", value) for value in ([1], "x", {"rope_theta": 0, "rope_type": "default"})),
    *(("llama", "rope_theta", value) for value in (0, -1, float("nan"), 10**39, "x")),
    *(("llama", "rope_scaling", {"rope_type": "linear", "factor": value, "rope_theta": 1e4}) for value in (0, float("inf"), "x")),
    *(("llama", name, value) for name in ("text_config", "auto_map", "headfold", "label2id") for value in ([], "x", 3)),
    ("llama", "quantization_config", "x"),
    ("llama", "transformers_weights", "pytorch_model.bin"),
    ("llama", "fusion_config", True),
    ("llama", "return_dict", 0),
    ("llama", "attention_dropout", 65536),
    ("t5", "decoder_start_token_id", 1e308),
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


K, NORM = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight"
TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "a vector": (K, lambda weight: weight.flatten(), "expected a matrix"),
    "fewer inputs": (K, lambda weight: weight[:, 8:].contiguous(), "40 inputs|48 inputs"),
    "another dtype": (K, torch.Tensor.half, "one dtype of real numbers"),
    "complex numbers": (K, lambda weight: weight.to(torch.complex64), "one dtype of real numbers"),
    "fewer gains": (NORM, lambda gains: gains[8:].contiguous(), "expected (48,)"),
}


@pytest.mark.parametrize(("name", "change", "words"), TENSORS.values(), ids=[*TENSORS])
def test_a_site_whose_tensors_do_not_fit_together_is_refused(
    refused: Callable[..., str], tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, name: change(tensors[name])}, model / "model.safetensors", {"format": "pt"})
    line = refused("inspect", model)
    assert "layers.1" in line and any(part in line for part in words.split("|"))


def test_biases_that_the_config_does_not_name_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors") | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    line = refused("fold", model, tmp_path / "out", *WORDS)
    assert "the checkpoint has tensors that the model does not take by its config" in line and "q_proj.bias" in line


def test_what_a_config_wants_forward_to_return_changes_nothing(tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "return_dict": False, "output_hidden_states": True}))
    made = headfold.fold(model, tmp_path / "out", kv_heads=4, group="contiguous", merge="mean", refit=False)
    assert made.verification.passed and json.loads((made.out / "config.json").read_text())["return_dict"] is False


def test_a_card_that_is_no_text_and_names_that_are_none(refused: Callable[..., str], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "model"))
    headfold.fold(model, tmp_path / "out", kv_heads=4, group="contiguous", merge="mean", refit=False)
    for card in (b"\xff", b'---\nlicense: "\\ud800"\n---\n'):
        (model / "README.md").write_bytes(card)
        headfold.fold(model, tmp_path / "out", kv_heads=2, group="contiguous", merge="mean", refit=False, force=True)
    (tmp_path / "out" / "README.md").write_bytes(b"\xff")
    assert read_card(tmp_path / "out") == "\ufffd"
    assert "expected a name in UTF-8" in refused("inspect", os.fsdecode(b"\xff"))


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


def test_a_loss_beyond_every_float_has_an_infinite_perplexity() -> None:
    scores = LossComparison(1, 800.0, (800.0,), 1.0, reference_nll=709.0)
    assert scores.perplexity == math.inf and scores.reference_perplexity == math.exp(709)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")]
)
def test_too_little_memory_is_said_in_one_line(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(model: str, **options: object) -> None:
        raise error

    monkeypatch.setattr("headfold.verbs.inspect.open_source", fail)
    assert "out of memory" in refused("inspect", tiny_checkpoint("llama", torch.float32))


def test_a_line_lists_no_more_names_than_can_be_read() -> None:
    names = [f"name-{number:03d}" for number in range(100)]
    assert suggest("zzz", names[:3]) == "choose one of name-000, name-001, name-002"
    assert suggest("zzz", names).endswith(", name-029 and 70 more")
    assert suggest("name-04x", names).startswith("did you mean name-")
