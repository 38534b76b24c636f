"""Recipes: the one beside a fold makes the same bytes again, one of several folds goes on after a kill, and errors name the line."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import headfold
from headfold.checkpoint.cards import CARD
from headfold.cli import app
from headfold.core.errors import AlreadyFinished, UserError
from headfold.recipes import yaml_input
from headfold.recipes.recipe import NAME
from headfold.verbs import run as verb

_ROOT = tempfile.TemporaryDirectory()
DATA: dict[str, Any] = {"calibration": f"{_ROOT.name}/text.txt", "tokens": 256, "context": 16, "verify": False}


@lru_cache
def source_checkpoint(kv_heads: int = 4) -> Path:
    """Return a tiny Llama with a tokenizer of single letters, and a text to calibrate on."""
    words = {letter: number for number, letter in enumerate(["<s>", "<u>", "a", "b", "c", "d", "e"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<u>", bos_token="<s>")
    place = Path(_ROOT.name) / f"llama-{kv_heads}"
    shutil.copytree(tiny_checkpoint("llama", torch.float32, seed=kv_heads), place)
    fast.save_pretrained(place)
    (place.parent / "text.txt").write_text("abcde" * 400)
    return place


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files of a fold but for its card, which has times."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != CARD}


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": "1/2"},
        {"kv_heads": 2, "group": "swap:cost=absorb", "merge": "procrustes", "refit": False},
        {"kv_heads": 2, "merge": "mean", "refit": False, "seed": 3, "dtype": "float32"},
        {"kv_heads": 2, "heal": True, "heal_by": "block", "heal_tokens": 64},
        {"to": "mla", "kv_rank": "1/2", "refit": False},
        {"to": "mla", "kv_rank": 12, "rope_dim": 8},
    ],
)
def test_the_recipe_of_a_fold_makes_the_same_bytes(tmp_path: Path, options: Mapping[str, Any]) -> None:
    source = source_checkpoint()
    headfold.fold(source, tmp_path / "made", **{**DATA, **options})
    headfold.run(tmp_path / "made" / NAME, tmp_path / "again", model=source)
    assert contents(tmp_path / "again") == contents(tmp_path / "made")


def test_the_recipe_of_a_planned_fold_takes_the_plan_beside_it(tmp_path: Path) -> None:
    source, plan = source_checkpoint(), tmp_path / "any-name.json"
    stats = {name: DATA[name] for name in ("calibration", "tokens", "context")}
    headfold.calibrate(source, tmp_path / "stats.safetensors", seed=5, **stats)
    headfold.plan(source, plan, kv_heads=2, stats=tmp_path / "stats.safetensors")
    headfold.fold(source, tmp_path / "made", plan=plan, verify=False)
    plan.unlink()
    headfold.run(tmp_path / "made" / NAME, tmp_path / "again", model=source)
    assert contents(tmp_path / "again") == contents(tmp_path / "made")


def test_an_amount_of_the_data_that_statistics_record_is_all_that_a_recipe_names(tmp_path: Path) -> None:
    """As the name of the data comes with a seed of its own."""
    source, stats = source_checkpoint(), tmp_path / "stats.safetensors"
    headfold.calibrate(source, stats, seed=5, **{name: DATA[name] for name in ("calibration", "tokens", "context")})
    headfold.fold(source, tmp_path / "made", to="mla", kv_rank=12, rope_dim=8, stats=stats, tokens=128, verify=False)
    options = yaml.safe_load((tmp_path / "made" / NAME).read_text())["fold"]
    assert options["tokens"] == 128 and "calibration" not in options and "refit_by" not in options


def test_a_recipe_names_no_place_of_the_machine(tmp_path: Path) -> None:
    source = source_checkpoint()
    headfold.fold(source, tmp_path / "made", kv_heads=2, **DATA)
    assert yaml.safe_load((tmp_path / "made" / NAME).read_text())["model"] == source.name


def test_what_is_made_of_a_fold_does_not_keep_its_recipe(tmp_path: Path) -> None:
    headfold.fold(source_checkpoint(), tmp_path / "made", kv_heads=2, **DATA)
    headfold.export(tmp_path / "made", tmp_path / "other", layout="native")
    assert not (tmp_path / "other" / NAME).exists()


def written(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    return path


def several(tmp_path: Path, **parts: Any) -> Path:
    data = dict(DATA)
    folds = {"half": {"kv_heads": "1/2"}, "mean": {"kv_heads": "1/2", "merge": "mean", "refit": False}}
    recipe = {
        "model": str(source_checkpoint()), "every": data, "folds": folds, **parts
    }  # fmt: skip
    return written(tmp_path / "recipe.yaml", recipe)


def test_several_folds_are_made_and_measured(tmp_path: Path) -> None:
    recipe = several(tmp_path, eval={"text": DATA["calibration"], "limit": 64, "context": 16})
    found = headfold.run(recipe, tmp_path / "out")
    assert [row.name for row in found.rows] == ["half", "mean"]
    assert all(row.metric == "nll" and row.kl is not None for row in found.rows)
    measured = json.loads((tmp_path / "out" / "half.eval.json").read_text())
    assert measured["nll"] == found.rows[0].value
    headfold.run(tmp_path / "out" / "half" / NAME, tmp_path / "again", model=source_checkpoint())
    assert contents(tmp_path / "again") == contents(tmp_path / "out" / "half")


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that is whole is not made again; one whose end was not written down is."""
    recipe, made = several(tmp_path), []
    real: Callable[..., Any] = verb.fold

    def folds(model: Any, out: Path, **options: Any) -> Any:
        made.append(out.name)
        found = real(model, out, **options)
        if made == ["half", "mean"]:
            raise KeyboardInterrupt
        return found

    folds.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(verb, "fold", folds)
    with pytest.raises(KeyboardInterrupt):
        verb.run(recipe, tmp_path / "out")
    whole = contents(tmp_path / "out" / "mean")
    found = verb.run(recipe, tmp_path / "out")
    assert made == ["half", "mean", "mean"]
    assert [row.name for row in found.rows] == ["half", "mean"]
    assert contents(tmp_path / "out" / "mean") == whole
    verb.run(recipe, tmp_path / "out")
    assert made == ["half", "mean", "mean"]


def test_the_output_of_another_recipe_is_kept(tmp_path: Path) -> None:
    headfold.run(several(tmp_path), tmp_path / "out")
    (tmp_path / "out" / "half" / "mine.txt").write_text("mine")
    other = several(tmp_path, folds={"half": {"kv_heads": 1}})
    with pytest.raises(UserError, match="expected the output of this recipe"):
        headfold.run(other, tmp_path / "out")
    assert (tmp_path / "out" / "half" / "mine.txt").exists()
    assert headfold.run(other, tmp_path / "out", force=True).rows[0].fold.num_kv_heads_after == 1
    assert not (tmp_path / "out" / "half" / "mine.txt").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        headfold.run(other, tmp_path / "full")


def test_other_data_are_another_output(tmp_path: Path) -> None:
    """Names of files are not what decides, but what is in them; the same recipe begins anew if it is told to."""
    text = tmp_path / "text.txt"
    shutil.copyfile(DATA["calibration"], text)
    recipe = several(tmp_path, every={**DATA, "calibration": str(text)}, folds={"half": {"kv_heads": 2}})
    headfold.run(recipe, tmp_path / "out")
    before = (tmp_path / "out" / "half").stat().st_ino
    headfold.run(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "half").stat().st_ino == before
    headfold.run(recipe, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "half").stat().st_ino != before
    text.write_text("edcba" * 400)
    with pytest.raises(UserError, match="of the same model and files"):
        headfold.run(recipe, tmp_path / "out")


def test_a_fold_that_was_whole_when_it_was_killed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = verb.fold

    def folds(model: Any, out: Path, **options: Any) -> Any:
        if not options["force"]:
            raise AlreadyFinished("nothing is left to do")
        return real(model, out, **options)

    folds.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(verb, "fold", folds)
    assert [row.name for row in verb.run(several(tmp_path), tmp_path / "out").rows] == ["half", "mean"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what peft calls
def test_an_adapter_is_part_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds are compared with the model in which it is merged, and the recipe of a fold names it."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(source_checkpoint())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    folds, measured = {"all": {"kv_heads": 8, "refit": False}}, {"text": DATA["calibration"], "limit": 64}
    recipe = several(tmp_path, adapter=str(tmp_path / "lora"), folds=folds, eval=measured)
    found = headfold.run(recipe, tmp_path / "out").rows[0]
    assert found.value == pytest.approx(found.original, abs=1e-5)
    written = yaml.safe_load((tmp_path / "out" / "all" / NAME).read_text())
    assert written["adapter"] == "lora" and "adapter" not in written["fold"]
    latent = {
        "to": "mla",
        "kv_rank": 12,
        "rope_dim": 8,
        "refit": False,
        "columns": ["text"],
        "adapter": tmp_path / "lora",
    }
    headfold.fold(source_checkpoint(), tmp_path / "mla", **DATA, **latent)
    card = (tmp_path / "mla" / CARD).read_text()
    assert "with the LoRA adapter `lora` merged" in card and "--adapter lora" in card and "--columns text" in card
    assert "- Original: " in card and str(tmp_path / "lora") not in card
    assert yaml.safe_load((tmp_path / "mla" / NAME).read_text())["adapter"] == "lora"


def test_a_page_on_a_fold_to_mla_is_refused_before_anything_is_folded(tmp_path: Path) -> None:
    recipe = several(
        tmp_path, folds={"half": {"kv_heads": "1/2"}, "latent": {"to": "mla", "kv_rank": "1/2"}}, report=True
    )
    with pytest.raises(UserError, match="expected folds to fewer K/V heads on a page, got latent") as refused:
        headfold.run(recipe, tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_recipe_is_of_one_model(tmp_path: Path) -> None:
    headfold.fold(source_checkpoint(), tmp_path / "made", kv_heads=2, **DATA)
    with pytest.raises(UserError, match="expected the model that the recipe was made of"):
        headfold.run(tmp_path / "made" / NAME, tmp_path / "again", model=source_checkpoint(2))
    assert not (tmp_path / "again").exists()


GOOD = """\
model: my-model
folds:
  half:
    kv_heads: 1/2
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kv_heads", "kv_head", "4: kv_head: no such option of half; did you mean kv_heads?"),
        ("folds:", "fold:", "3: half: no such option of fold; did you mean heal?"),
        ("1/2", "[1, 2]", "4: kv_heads: expected text or a whole number, got [1, 2]"),
        ("1/2", "1/2\n    tokens: many", "5: tokens: expected a whole number, got 'many'"),
        ("1/2", "1/2\n    tokens: true", "5: tokens: expected a whole number, got True"),
        ("1/2", "1/2\n    refit: 1", "5: refit: expected true or false, got 1"),
        ("1/2", "1/2\n    columns: a", "5: columns: expected a list of texts, got 'a'"),
        ("1/2", "1/2\n    progress: a", "5: progress: no such option"),
        ("1/2", "1/2\n    merge: meen", "3: half: unknown merge method 'meen'; did you mean mean?"),
        ("1/2", "1/2\n    plan: plan.json", "3: half: expected one of kv_heads, plan and to, got kv_heads and plan"),
        ("    kv_heads: 1/2", "    refit: true", "3: half: expected one of kv_heads, plan and to, got none"),
        ("half", "../half", "3: ../half: expected a name for a directory, got a path"),
        ("half", ".half", "3: .half: expected a name for a directory"),
        ("model: my-model", "model: [a]", "1: model: expected text, got ['a']"),
        ("model: my-model", "model: my-model\nreport: 3", "2: report: expected true or false, got 3"),
        ("model: my-model", "model: my-model\neval: {limit: x}", "2: limit: expected a whole number"),
        ("model: my-model", "model: my-model\nmodel: b", "2: model: it stands twice"),
        ("model: my-model", "modle: my-model", "1: modle: a recipe has no such part; did you mean model?"),
        ("model: my-model", "fold: {kv_heads: 2}\nmodel: m", "got both; give one"),
        ("model: my-model\n", "", "model: expected a checkpoint directory or a hub id, got none"),
        ("1/2", "2026-01-01", "4: expected text or a number, got '2026-01-01'; quote it"),
        ("1/2", ".inf", "4: expected text or a number"),
        ("1/2", "1" * 50, "4: expected a number of at most"),
        ("1/2", "1" * 5000, "not valid YAML"),
        ("1/2", "!!python/name:os.system ''", "4: expected no tags"),
        ("1/2", "!!int ''", "4: expected no tags, got"),
        ("1/2", "1/2\n    columns: [1]", "5: columns: expected a list of texts, got [1]"),
        ("1/2", "1/2\n    push_to_hub: me/mine", "5: push_to_hub: no such option"),
        ("1/2", "1/2\n    device: cuda", "5: device: no such option"),
        ("1/2", "&a 1/2\n    tokens: *a", "5: expected no aliases, got *a"),
        ("1/2", '"a\\nb"', "4: expected printable text"),
        ("1/2", "{{", "not valid YAML"),
        ("1/2", "[" * 1200, "not valid YAML"),
        ("model: my-model", "\x00", "not valid YAML"),
        (GOOD, "- a\n", "expected a mapping, such as model: my-model, got a sequence"),
        (GOOD, "", "expected a mapping, such as model: my-model, got nothing"),
        (GOOD, "model: a\nfolds: {}\n", "2: folds: expected a fold"),
        (GOOD, "model: a\nfold: {kv_heads: 2}\neval: {}\n", "3: eval: expected folds with names"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace(old, new).replace("my-model", str(source_checkpoint())))
    answer = CliRunner().invoke(app, ["run", str(path), str(tmp_path / "out")])
    assert isinstance(answer.exception, UserError), answer.output
    assert str(answer.exception).count("\n") == 0
    assert said in str(answer.exception)
    assert str(answer.exception).startswith(str(path))
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_a_small_regular_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got a directory"):
        headfold.run(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="got a device"):
        headfold.run("/dev/zero", tmp_path / "out")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (yaml_input.MAX_BYTES + 1))
    with pytest.raises(UserError, match="expected at most"):
        headfold.run(large, tmp_path / "out")
    large.write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="not valid YAML"):
        headfold.run(large, tmp_path / "out")
