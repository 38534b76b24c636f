"""`--adapter` where a fold is compared with its original: the original is the model with the adapter merged."""

# ruff: noqa: F811 - fixtures are arguments

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from safetensors.torch import load_file, save_file
from test_cli import run  # noqa: F401 (a fixture)
from test_recipes import source_checkpoint
from test_source_adapters import adapted

import headfold
from headfold.core.errors import UserError
from headfold.pages.results import labels
from headfold.sources.adapter import open_adapter
from headfold.sources.bases import check_base
from headfold.sources.plain import open_plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # which peft still reads
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
]
ALL_HEADS: dict[str, Any] = {"kv_heads": 8, "merge": "mean", "refit": False, "verify": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An adapter, a text, and a fold of original and adapter that keeps all heads."""
    made = tmp_path_factory.mktemp("adapters")
    (made / "text.txt").write_text("abcde" * 60)
    torch.manual_seed(0)
    adapted(source_checkpoint(), made / "lora")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(made / "cache"))
        headfold.fold(source_checkpoint(), made / "fold", adapter=made / "lora", **ALL_HEADS)
        yield made


def loss_of(place: Path, model: str | Path, **options: Any) -> Any:
    return headfold.eval(model, text=str(place / "text.txt"), dtype="float32", **options)


def test_eval_merges_it_into_the_reference(place: Path, run) -> None:
    base, lora = source_checkpoint(), place / "lora"
    found = loss_of(place, place / "fold", reference=base, adapter=lora)
    assert found.kl == pytest.approx(0, abs=1e-9) and found.reference == f"{base} + {lora.name}"
    assert loss_of(place, place / "fold", reference=base).kl > 1e-3
    words = ("--reference", base, "--adapter", lora, "--text", place / "text.txt", "--json")
    assert json.loads(run("eval", place / "fold", *words).out)["kl"] == pytest.approx(0, abs=1e-9)


def test_eval_merges_it_into_the_first_model(place: Path) -> None:
    base, lora = source_checkpoint(), place / "lora"
    alone = loss_of(place, base, adapter=lora)
    assert alone.model == f"{base} + {lora.name}"
    assert labels([alone]) == {alone.model: f"{Path(base).name} + {lora.name}"}  # on a page
    assert alone.perplexity == pytest.approx(loss_of(place, place / "fold").perplexity, rel=1e-5)
    merged, fold, plain = loss_of(place, base, compare=[place / "fold", base], adapter=lora).rows
    assert fold.value == pytest.approx(merged.value, rel=1e-5) and plain.value != pytest.approx(merged.value, rel=1e-2)


def test_compare_folds_and_measures_the_merged_model(place: Path, tmp_path: Path, run) -> None:
    text = place / "text.txt"
    words = (
        "--kv-heads",
        "8,4",
        "--methods",
        "mean",
        "--adapter",
        place / "lora",
        "--text",
        text,
        "--calibration",
        text,
        "--tokens",
        64,
    )
    said = run("compare", source_checkpoint(), *words, "--context", 16, "--out", tmp_path / "rows", "--json")
    whole, half = json.loads(said.out)
    assert whole["loss_increase"] == pytest.approx(0, abs=1e-6) and half["loss_increase"] != pytest.approx(0, abs=1e-6)
    merged = loss_of(place, source_checkpoint(), adapter=place / "lora", context=16)
    assert half["original"] == pytest.approx(math.log(merged.perplexity), rel=1e-5)


def test_frontier_takes_statistics_of_the_merged_model(
    place: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object) -> None:
        raise UserError("the statistics are taken")

    monkeypatch.setattr("headfold.verbs.frontier.teacher_of_statistics", reached)
    text, stats = place / "text.txt", tmp_path / "stats.safetensors"
    headfold.calibrate(source_checkpoint(), stats, adapter=place / "lora", calibration=str(text), tokens=64, context=16)
    words = ("frontier", source_checkpoint(), tmp_path / "front", "--stats", stats)
    assert "statistics of another model" in run(*words).err
    assert "the statistics are taken" in run(*words, "--adapter", place / "lora").err


def test_check_runs_the_merged_model(place: Path, run) -> None:
    merged = open_plain(str(source_checkpoint()), str(place / "lora")).path
    found = headfold.check(source_checkpoint(), adapter=place / "lora")
    assert found.model == merged and all(
        str(merged) in row.serve for row in found.rows if "not served" not in row.serve
    )
    assert json.loads(run("check", source_checkpoint(), "--adapter", place / "lora", "--json").out)["model"] == str(
        merged
    )


@pytest.mark.parametrize("verb", ["eval", "check", "compare", "frontier"])
def test_an_adapter_of_another_base_is_refused(verb: str, place: Path, tmp_path: Path, run) -> None:
    """In one line, before anything is written."""
    found = load_file(place / "lora" / "adapter_model.safetensors")
    (tmp_path / "other").mkdir()
    save_file(
        {name.replace("layers.1", "layers.7"): tensor for name, tensor in found.items()},
        tmp_path / "other" / "adapter_model.safetensors",
    )
    (tmp_path / "other" / "adapter_config.json").write_text((place / "lora" / "adapter_config.json").read_text())
    options = {"compare": ("--kv-heads", 4, "--out", tmp_path / "out"), "frontier": (tmp_path / "out",)}.get(verb, ())
    said = run(verb, source_checkpoint(), *options, "--adapter", tmp_path / "other")
    assert said.code == 2 and said.err.strip().count("\n") == 0, said.err
    assert "pass the model that the adapter was made for" in said.err and not (tmp_path / "out").exists()


def test_an_adapter_that_fits_by_its_shapes_alone_is_refused(place: Path, tmp_path: Path) -> None:
    """Q and O of a fold have the shapes of the original's, and other heads."""
    base, only = source_checkpoint(), {"target_modules": ["q_proj", "o_proj"]}
    headfold.fold(base, tmp_path / "fold", **{**ALL_HEADS, "kv_heads": 4})
    adapted(base, tmp_path / "of the original", **only)
    with pytest.raises(UserError) as error:
        loss_of(place, tmp_path / "fold", adapter=tmp_path / "of the original")
    one_line(error, "its original", "headfold fold ORIGINAL OUT --adapter")
    adapted(tmp_path / "fold", tmp_path / "of the fold", **only)
    with pytest.raises(UserError) as error:
        loss_of(place, tmp_path / "fold", reference=base, adapter=tmp_path / "of the fold")
    one_line(error, "a fold", "the original's own adapter")
    assert loss_of(place, tmp_path / "fold", adapter=tmp_path / "of the fold").perplexity > 1


def test_a_fold_that_runs_in_headfolds_runtime_takes_no_adapter(place: Path) -> None:
    """Its projections are others than those of the class that its config names."""
    with pytest.raises(UserError) as error:
        check_base(open_adapter(place / "lora"), source_checkpoint(), {"headfold": {"sites": []}})
    one_line(error, "runs in headfold's runtime", "headfold fold ORIGINAL OUT --adapter")


def test_an_adapter_of_what_a_base_was_trained_from_is_merged(place: Path, tmp_path: Path) -> None:
    """A published model of chat names the model that it was trained from, and adapters of that are used on it."""
    shutil.copytree(source_checkpoint(), tmp_path / "chat")
    (tmp_path / "chat" / "README.md").write_text(f"---\nbase_model: {source_checkpoint()}\n---\n")
    adapter = open_adapter(place / "lora")
    check_base(adapter, tmp_path / "chat", {})
    (tmp_path / "chat" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="its original"):
        check_base(adapter, tmp_path / "chat", {})
