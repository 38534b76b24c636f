"""Laws of the ONNX format: in onnxruntime, graphs compute what headfold's runtime computes, with a cache of as many heads as each layer has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from grouped_models import ONE, UNEVEN, grouped
from tiny import tiny_checkpoint

import headfold
from headfold.core.errors import UserError
from headfold.exports.engines import onnx as engine
from headfold.verbs.export import export

SMALL: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1},
    "vit": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 2},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
    "mistral": {"num_hidden_layers": 1},
}


def folded(name: str, path: Path) -> Path:
    source = tiny_checkpoint(name, torch.float32, **SMALL[name])
    headfold.fold(
        source, path, kv_heads="1/2", merge="mean", group="contiguous", refit=False, verify=False, layout="headfold"
    )
    return path


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def shapes(of: Any) -> dict[str, list[Any]]:
    return {one.name: one.shape for one in of}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5")
    result = export(folded("t5", path / "fold"), path / "out", layout="onnx")
    assert result.difference is not None and result.difference <= result.tolerance
    return path


def test_the_graphs_of_an_encoder_decoder_have_the_names_of_optimum(t5: Path) -> None:
    out = t5 / "out"
    assert {file.name for file in out.glob("*.onnx*")} == {
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx",
    }  # fmt: skip
    first, later = (session(out / f"decoder{kind}_model.onnx") for kind in ("", "_with_past"))
    own, crossed = ["batch_size", 4, "past_sequence_length", 5], ["batch_size", 4, "encoder_sequence_length", 5]
    past = {
        f"past_key_values.{layer}.{part}.{role}": shape
        for layer in range(2)
        for part, shape in (("decoder", own), ("encoder", crossed))
        for role in ("key", "value")
    }
    text, mask = ["batch_size", "sequence_length"], ["batch_size", "encoder_sequence_length"]
    assert shapes(later.get_inputs()) == {"encoder_attention_mask": mask, "input_ids": text, **past}
    assert list(shapes(later.get_inputs()))[2:] == list(past)  # Optimum hands them over in this order
    assert shapes(first.get_inputs()).keys() == {"encoder_attention_mask", "input_ids", "encoder_hidden_states"}
    presents = [name.replace("past_key_values", "present") for name in past]
    assert list(shapes(first.get_outputs())) == ["logits", *presents]
    assert list(shapes(later.get_outputs())) == ["logits", *(name for name in presents if ".decoder." in name)]


def test_a_greedy_translation_is_the_runtimes(t5: Path) -> None:
    model = headfold.load(t5 / "fold", dtype=torch.float32)
    ids = np.array([[7, 8, 30, 9, 41], [12, 50, 3, 0, 0]])
    mask = (ids != 0).astype(np.int64)
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(**given, **options)
    encoder, first, later = (
        session(t5 / "out" / f"{name}_model.onnx") for name in ("encoder", "decoder", "decoder_with_past")
    )
    (states,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    inputs = {"encoder_attention_mask": mask, "encoder_hidden_states": states, "input_ids": np.zeros((2, 1), np.int64)}
    tokens, running = [inputs["input_ids"]], first
    for _ in range(12):
        wanted = {name: inputs[name] for name in shapes(running.get_inputs())}
        said = dict(zip(shapes(running.get_outputs()), running.run(None, wanted), strict=True))
        said["logits"][..., model.config.eos_token_id] = -np.inf
        inputs["input_ids"] = said.pop("logits")[:, -1:].argmax(-1)
        inputs |= {name.replace("present", "past_key_values"): tensor for name, tensor in said.items()}
        tokens.append(inputs["input_ids"])
        running = later
    assert np.array_equal(np.concatenate(tokens, 1), expected.numpy())


def test_each_layer_caches_the_heads_that_it_has(tmp_path: Path) -> None:
    """In groups of any size, without an operator that only some engines know, and without a path of this machine."""
    grouped("llama", [UNEVEN, ONE], tmp_path / "folded", torch.bfloat16)
    result = export(tmp_path / "folded", tmp_path / "out", layout="onnx")
    assert result.difference is not None and "1 or 3 K/V heads" in result.description
    found = shapes(session(tmp_path / "out/model.onnx").get_inputs())
    counts = [found[f"past_key_values.{layer}.{role}"][1] for layer in range(2) for role in ("key", "value")]
    assert counts == [3, 3, 1, 1]
    assert found["attention_mask"] == ["batch_size", "past_sequence_length + sequence_length"]
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    assert str(Path(headfold.__file__).parent).encode() not in (tmp_path / "out/model.onnx").read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "float32" and not {"headfold", "auto_map"} & config.keys()
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(("name", "outputs"), [("bert", ["logits"]), ("vit", ["logits"])])
def test_an_encoder_is_one_graph(name: str, outputs: list[str], tmp_path: Path) -> None:
    result = export(folded(name, tmp_path / "fold"), tmp_path / "out", layout="onnx")
    assert result.difference is not None
    found = session(tmp_path / "out/model.onnx")
    texts = ["input_ids", "attention_mask", "token_type_ids"]
    assert list(shapes(found.get_inputs())) == (["pixel_values"] if name == "vit" else texts)
    assert list(shapes(found.get_outputs())) == outputs
