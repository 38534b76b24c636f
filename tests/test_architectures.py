"""Configs that do not say which class saved the weights end in a line, before anything is measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint

import headfold
from headfold.core.errors import UserError
from headfold.hf_models import open_model

BASELINE: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False, verify=False)
WITHOUT: dict[str, dict[str, Any]] = {"absent": {}, "null": {"architectures": None}, "empty": {"architectures": []}}
WRONG = ["T5ForConditionalGeneration", [1], {"a": 1}, [["x"]], 7, True, [None]]


def renamed(name: str, out: Path, named: dict[str, Any]) -> Path:
    """Return a copy of a tiny model whose config has these `architectures`."""
    shutil.copytree(tiny_checkpoint(name, torch.float32), out)
    config = json.loads((out / "config.json").read_text())
    del config["architectures"]
    (out / "config.json").write_text(json.dumps(config | named))
    return out


@pytest.mark.parametrize("named", WRONG, ids=str)
@pytest.mark.parametrize("name", ["t5"])
def test_what_is_no_list_of_names_is_refused(name: str, named: Any, tmp_path: Path) -> None:
    source = renamed(name, tmp_path / "source", {"architectures": named})
    for verb in (lambda: headfold.fold(source, tmp_path / "out", **BASELINE), lambda: headfold.inspect(source)):
        with pytest.raises(UserError, match="config.json: architectures: expected a list of class names"):
            verb()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("named", WITHOUT.values(), ids=[*WITHOUT])
@pytest.mark.parametrize("name", ["llama", "t5", "vit", "gpt2"])
def test_a_fold_needs_the_name_of_the_class(name: str, named: dict[str, Any], tmp_path: Path) -> None:
    """It decides what the tensors are called, what data the model takes, and what opens the fold. Looking at it needs none."""
    source = renamed(name, tmp_path / "source", named)
    assert headfold.inspect(source).architecture == "unknown"
    with pytest.raises(UserError, match="architectures: expected the class of transformers .* got none; add it"):
        headfold.fold(source, tmp_path / "out", **BASELINE)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("named", "said"), [({}, "got none; add it"), ({"architectures": ["Strange"]}, "got Strange")])
@pytest.mark.parametrize("name", ["t5", "vit", "bert"])
def test_what_transformers_does_not_have_is_not_measured(name: str, named: Any, said: str, tmp_path: Path) -> None:
    source = renamed(name, tmp_path / "source", named)
    with pytest.raises(UserError, match=f"architectures: expected .* {said}"):
        open_model(source, dtype=torch.float32, device="cpu")
