"""Laws of the ONNX format: in onnxruntime, graphs compute what headfold's runtime computes, with a cache of the heads of each layer."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from grouped_models import EVEN, ONE, UNEVEN, config_of, grouped, tokens
from safetensors.torch import load_file
from tiny import stock_model, tiny_checkpoint
from torch import nn

import headfold
from headfold.core.errors import UserError
from headfold.exports.engines import onnx as engine
from headfold.graphs.comparison import compare_graphs
from headfold.graphs.files import write_graph
from headfold.graphs.graph import Graph
from headfold.verbs.export import export

SMALL: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1},
    "clip": {},
    "t5": {"num_layers": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
}


def folded(name: str, path: Path) -> Path:
    source = tiny_checkpoint(name, torch.float32, **SMALL[name])
    headfold.fold(source, path, kv_heads="1/2", merge="mean", group="contiguous", refit=False, verify=False)
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
        for layer in range(1)
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
    """In groups of any size, behind a window, without an operator that only some engines know, and without a path of this machine."""
    grouped("mistral", [UNEVEN, ONE], tmp_path / "folded", torch.bfloat16)
    result = export(tmp_path / "folded", tmp_path / "out", layout="onnx")
    assert result.difference is not None and result.tolerance is not None and result.difference <= result.tolerance
    assert "float32" in result.description and "1 or 3 K/V heads" in result.description
    found = shapes(session(tmp_path / "out/model.onnx").get_inputs())
    counts = [found[f"past_key_values.{layer}.{role}"][1] for layer in range(2) for role in ("key", "value")]
    assert counts == [3, 3, 1, 1]
    assert list(found)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert found["attention_mask"] == ["batch_size", "past_sequence_length + sequence_length"]
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    written = (tmp_path / "out/model.onnx").read_bytes()
    weights = sum(tensor.numel() for tensor in load_file(tmp_path / "folded/model.safetensors").values())
    assert b"site-packages" not in written and b"headfold" not in written and 4 * weights < len(written) < 5 * weights
    config = config_of(tmp_path / "out")
    assert config["dtype"] == "float32" and not {"headfold", "auto_map"} & config.keys()
    assert not list((tmp_path / "out").glob("*.py"))
    card = (tmp_path / "out/README.md").read_text()
    assert "ONNX graphs in float32" in card and "old" not in card and "## Made by" in card


def test_a_model_of_texts_and_images_is_one_graph(tmp_path: Path) -> None:
    """Texts and images are compared in different numbers, and texts with padding."""
    result = export(folded("clip", tmp_path / "fold"), tmp_path / "out", layout="onnx")
    assert result.difference is not None and result.tolerance is not None and result.difference <= result.tolerance
    found = session(tmp_path / "out/model.onnx")
    text = ["text_batch_size", "sequence_length"]
    images = ["image_batch_size", 3, 12, 12]
    assert shapes(found.get_inputs()) == {"input_ids": text, "attention_mask": text, "pixel_values": images}
    assert list(shapes(found.get_outputs())) == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]


def test_a_whisper_decodes_without_a_mask(tmp_path: Path) -> None:
    result = export(folded("whisper", tmp_path / "fold"), tmp_path / "out", layout="onnx")
    assert result.difference is not None and result.tolerance is not None and result.difference <= result.tolerance
    later = shapes(session(tmp_path / "out/decoder_with_past_model.onnx").get_inputs())
    assert "encoder_attention_mask" not in later and later["past_key_values.0.decoder.key"][1] == 4
    assert shapes(session(tmp_path / "out/encoder_model.onnx").get_inputs()) == {
        "input_features": ["batch_size", 6, 22]
    }


def test_graphs_that_compute_something_else_are_found(t5: Path) -> None:
    """A change of one weight of the decoder's cross-attention by a hundredth."""
    model = headfold.load(t5 / "fold", dtype=torch.float32)
    difference, tolerance = compare_graphs(model, t5 / "out", lambda count: None)
    assert difference <= tolerance
    with torch.no_grad():
        model.decoder.block[0].layer[1].EncDecAttention.v.weight[0].mul_(1.01)
    difference, tolerance = compare_graphs(model, t5 / "out", lambda count: None)
    assert difference > tolerance


def test_graphs_that_compute_something_else_are_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "write_graph", lambda graph, path: (path / graph.file).write_bytes(b""))
    with pytest.raises(UserError, match=r"model\.onnx: expected a graph that onnxruntime runs, got .*; export again"):
        export(folded("bert", tmp_path / "fold"), tmp_path / "out", layout="onnx")
    monkeypatch.setattr(engine, "compare_graphs", lambda *rest: (float("nan"), 0.1))
    with pytest.raises(UserError, match=r"within 0\.1, got a difference of nan in onnxruntime; left there and not"):
        export(tmp_path / "fold", tmp_path / "out", layout="onnx")
    assert not (tmp_path / "out").exists()


def test_float16_is_written_if_asked(tmp_path: Path) -> None:
    export(folded("bert", tmp_path / "fold"), tmp_path / "out", layout="onnx", quantise="f16")
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "out/model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds and onnx.TensorProto.DOUBLE not in kinds
    assert config_of(tmp_path / "out")["dtype"] == "float16"
    ids = tokens(9)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = headfold.load(tmp_path / "fold", dtype=torch.float32)(**given).logits.numpy()
    graph = session(tmp_path / "out/model.onnx")
    assert list(shapes(graph.get_inputs())) == list(given) and list(shapes(graph.get_outputs())) == ["logits"]
    (found,) = graph.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    assert found.dtype == np.float16 and 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_graph_does_not_repeat_keys_and_values() -> None:
    """A stock class with equal groups would."""
    model = stock_model(tiny_checkpoint("llama", torch.float64, num_key_value_heads=2))
    expected = model(tokens()).logits
    assert {m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")} == {4}
    packed = engine.pack_queries(model)
    assert {m.num_key_value_groups for m in packed.modules() if hasattr(m, "num_key_value_groups")} == {1}
    assert (packed(tokens()).logits - expected).abs().max() < 1e-5 * expected.abs().max()


class Fixed(nn.Module):
    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs["x"].reshape(3, 4),)


class Refused(nn.Module):
    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs["x"] if inputs["x"].sum() > 0 else -inputs["x"],)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 300)

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        return (self.linear(inputs["x"]),)


def graph(module: nn.Module) -> Graph:
    return Graph(file="g.onnx", module=module, inputs={"x": torch.ones(3, 4)}, outputs=["y"], axes={"x": {0: "n"}})


@pytest.mark.parametrize(
    ("module", "said"),
    [(Fixed(), "inferred a static shape of 3 for dimension"), (Refused(), "Could not guard on data-dependent")],
)
def test_what_cannot_be_traced_is_refused_in_one_line(module: nn.Module, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as found:
        write_graph(graph(module), tmp_path)
    assert "\n" not in str(found.value) and not list(tmp_path.iterdir())


def test_many_weights_lie_beside_the_graph(tmp_path: Path) -> None:
    write_graph(graph(Small()), tmp_path, largest=1000)
    assert {file.name for file in tmp_path.iterdir()} == {"g.onnx", "g.onnx_data"}
    (found,) = session(tmp_path / "g.onnx").run(None, {"x": np.ones((1, 4), np.float32)})
    assert found.shape == (1, 300)


def test_the_packages_that_are_needed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded", torch.float32)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript and onnxruntime: pip install 'headfold\[onnx\]'"):
        export(tmp_path / "folded", tmp_path / "out", layout="onnx")
    assert not (tmp_path / "out").exists()
