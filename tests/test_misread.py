"""What headfold says of readers that take a checkpoint for another one: on the card, on the terminal, and by `headfold export`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint

import headfold
from headfold.exports.misread import misread_by

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "larger heads": ({"rope_parameters": LONGROPE}, ("llama.cpp", "onnxruntime-genai")),
    "linear": ({"rope_parameters": {"rope_type": "linear"}}, ("onnxruntime-genai",)),
    "yarn, under the old name": ({"rope_scaling": {"rope_type": "yarn"}}, ("onnxruntime-genai", "mistral.rs")),
    "linear, under the oldest name": ({"rope_scaling": {"type": "linear"}}, ("onnxruntime-genai",)),
    "linear in some layers": ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, ("onnxruntime-genai",)),
    "llama3": ({"rope_parameters": {"rope_type": "llama3"}}, ("CTranslate2",)),
    "query heads": (HEADS | {"per_layer_config": {"1": {"num_attention_heads": 12}}}, ("OpenVINO",)),
    "biases of attention": ({"model_type": "llama", "attention_bias": True}, ("mistral.rs",)),
    "biases of the MLP": ({"model_type": "llama", "mlp_bias": True}, ("mistral.rs",)),
    "a bias of the output": ({"model_type": "phi"}, ("mistral.rs",)),
    "norms": ({"model_type": "olmo"}, ("onnxruntime-genai",)),
}
RIGHT = {
    "plain": {"model_type": "llama", "rope_parameters": {"rope_type": "default"}},
    "without biases": {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "two lengths": {"rope_parameters": LONGROPE | {"long_factor": [1.0, 3.0]}},
    "one number of query heads": HEADS | {"per_layer_config": {"1": {"num_key_value_heads": 4}}},
    "all layers alike": {
        "num_hidden_layers": 2,
        "per_layer_config": {str(n): {"num_attention_heads": 12, "num_key_value_heads": 2} for n in range(2)},
    }
    | HEADS,
    "no fields in a layer": HEADS | {"per_layer_config": {"1": None}},
    "our own class": {"model_type": "olmo", "headfold": {}},
}


@pytest.mark.parametrize(("config", "readers"), WRONG.values(), ids=WRONG)
def test_readers_that_compute_something_else_are_named(config: dict[str, Any], readers: tuple[str, ...]) -> None:
    said = misread_by(config)
    assert all(reader in said for reader in readers)
    assert "without an error" in said


@pytest.mark.parametrize("config", RIGHT.values(), ids=RIGHT)
def test_others_are_not(config: dict[str, Any]) -> None:
    assert misread_by(config) == ""


@pytest.mark.parametrize("kind", ["llama", "granite", "gemma", "phi3"])
def test_a_file_that_is_named_instead_can_be_written(kind: str) -> None:
    """By an architecture with such factors, for heads of another size than the class has."""
    said = misread_by({"model_type": kind, "rope_parameters": LONGROPE})
    assert ("--layout gguf writes them" in said) == (kind in ("llama", "granite"))


def test_a_fold_says_so(tmp_path: Path) -> None:
    """On its card and among its notes."""
    source = tiny_checkpoint("phi", torch.float32)
    made = headfold.fold(source, tmp_path / "fold", kv_heads=1, merge="mean", group="contiguous", refit=False)
    assert any("mistral.rs" in note for note in made.notes)
    assert "Not every reader: biases are ignored" in (tmp_path / "fold/README.md").read_text()
