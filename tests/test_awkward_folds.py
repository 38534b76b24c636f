"""Folds of sources that are odd outside their attention, and what they leave and record."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import model  # noqa: F401  (a fixture)
from tiny import tiny_checkpoint

import headfold
from headfold.core.errors import UserError

BASELINE = {"merge": "mean", "group": "contiguous"}


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_nan_outside_attention_is_named_by_verification(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 1] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight: 1 of \d+ elements are NaN"):
        headfold.fold(source, tmp_path / "out", kv_heads=4, refit=False, **BASELINE)
    assert not (tmp_path / "out").exists()


def test_a_refusal_before_anything_is_made_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match="empty.txt"):
        headfold.fold(source, tmp_path / "out", kv_heads=4, calibration=str(tmp_path / "empty.txt"))
    assert set(tmp_path.iterdir()) == before


def test_the_card_tells_the_text_of_the_statistics_from_that_of_the_refit(source: Path, tmp_path: Path) -> None:
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    other.write_text("and now for something else, said the dog\n" * 60)
    stats = tmp_path / "stats.safetensors"
    headfold.calibrate(source, stats, calibration=str(text), tokens=256)
    words = {"calibration": str(other), "tokens": 256, "verify": False}

    headfold.fold(source, tmp_path / "out", kv_heads=4, stats=stats, **words)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Calibration: `{text}`" in card and f"Refitted on: `{other}`" in card and "--stats" in card

    headfold.fold(source, tmp_path / "baseline", kv_heads=4, **BASELINE, **words)
    card = (tmp_path / "baseline" / "README.md").read_text()
    assert "Calibration: none" in card and f"Refitted on: `{other}`" in card

    headfold.fold(source, tmp_path / "one", kv_heads=4, **words)
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"Calibration: `{other}`" in card and "Refitted on" not in card


def test_a_plan_makes_its_folder(source: Path, tmp_path: Path) -> None:
    headfold.plan(source, tmp_path / "new" / "plan.json", kv_heads=4, **BASELINE)
    assert (tmp_path / "new" / "plan.json").exists()


def test_a_model_type_that_is_no_name_is_refused(source: Path) -> None:
    config = source / "config.json"
    before = config.read_text()
    for name in (["llama"], "../llama", "é" * 500):
        config.write_text(before.replace('"model_type": "llama"', f'"model_type": {json.dumps(name)}'))
        with pytest.raises(UserError, match="model_type: expected a name") as raised:
            headfold.inspect(source)
        assert len(str(raised.value)) < 300
    config.write_text(before.replace("LlamaForCausalLM", "é" * 500))
    with pytest.raises(UserError, match="architectures: expected a list of class names"):
        headfold.inspect(source)


def test_a_fused_layer_with_one_key_head_stays_a_stock_one(tmp_path: Path) -> None:
    """Falcon-7B has one K/V head, for which its config has no count."""
    directory, out = tiny_checkpoint("falcon-multi-query"), tmp_path / "out"
    fold = headfold.fold(directory, out, kv_heads=1, refit=False, **BASELINE)
    assert fold.verification is not None
    assert "headfold" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("card", ["---\na: [\n---\n", "---\n- mit\n---\n", "---\n" + "[" * 9999 + "\n---\n"])
def test_a_card_that_cannot_be_read_costs_its_metadata_alone(card: str, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(card)
    headfold.fold(source, tmp_path / "out", kv_heads=4, refit=False, verify=False, **BASELINE)
    assert "base_model: model" in (tmp_path / "out" / "README.md").read_text()
