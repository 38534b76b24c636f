"""Two processes train as one does, whole or sharded, and say what one says."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_parallel import launched_by_two
from tiny import tiny_checkpoint

import headfold
from headfold.core.errors import UserError
from headfold.verbs.uptrain import uptrain

STEPS: dict[str, Any] = dict(steps=4, batch=4, context=16, save_every=2, log_every=1, learning_rate=1e-2)
BASELINE: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    """A decoder, a translator and their folds, and what to train them on."""
    place = tmp_path_factory.mktemp("uptrained")
    (place / "text.txt").write_text(
        "\n\n".join(f"the {n}th line of {n * n}, no more than {n + 1}." for n in range(100))
    )
    lines = [{"source": "a " * (n % 7 + 1), "target": "b " * (n % 5 + 1)} for n in range(64)]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for family, data in (("llama", {}), ("t5", dict(calibration=str(place / "pairs.jsonl"), items=8))):
        shutil.copytree(tiny_checkpoint(family, torch.float32, vocab_size=len(tokenizer)), place / family)
        tokenizer.save_pretrained(place / family)
        headfold.fold(place / family, place / f"{family}-gqa", **BASELINE, **data)
    config = place / "t5-gqa" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "dropout_rate": 0.0})
    )  # drawn by each process for its share
    return place


def how(place: Path, family: str, *, distilled: bool = True) -> dict[str, Any]:
    data = "text.txt" if family == "llama" else "pairs.jsonl"
    original = {"distill": str(place / family)} if distilled else {"optimizer": "adamw"}
    return {"folded": str(place / f"{family}-gqa"), "data": str(place / data), **STEPS, **original}


def words(out: str, folded: str, **options: Any) -> list[str]:
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["uptrain", folded, out, *given]


COMMANDS = {"pairs": ("t5", False), "pairs distilled": ("t5", True)}


@pytest.fixture(scope="module")
def launched(place: Path) -> dict[str, list[list[Any]]]:
    """By command, what each process answered: code, stdout, stderr."""
    commands = {
        name: [*words(str(place / name), **{**how(place, family, distilled=distilled), "save_every": 4}), "--json"]
        for name, (family, distilled) in COMMANDS.items()
    }
    commands["plotted"] = words(str(place / "plotted"), **{**how(place, "llama"), "steps": 1}, plot=place / "curve.png")
    commands["no data"] = words(str(place / "refused"), **{**how(place, "llama"), "data": "nowhere.txt"})
    commands["in the way"] = words(str(place / "plotted"), **how(place, "llama"))
    commands["diverged"] = words(str(place / "diverged"), **{**how(place, "llama"), "learning_rate": 1e30})
    (place / "commands.json").write_text(json.dumps(list(commands.values())))
    (place / "how.json").write_text(json.dumps(how(place, "llama", distilled=False)))
    answers = launched_by_two("train", place)
    return {name: [answer[number] for answer in answers] for number, name in enumerate(commands)}


def same_curve(found: list[dict[str, float]], expected: list[dict[str, float]], **tolerance: float) -> None:
    assert len(found) == len(expected) == STEPS["steps"]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name != "site_error":
                assert math.isclose(value, other[name], **tolerance), (name, value, other[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_losses_are_those_of_one_process(name: str, place: Path, launched: dict[str, Any], tmp_path: Path) -> None:
    (code, out, err), second = launched[name]
    assert code == 0 and second == [0, "", ""], err
    family, distilled = COMMANDS[name]
    alone = uptrain(out=tmp_path / "out", **how(place, family, distilled=distilled), device="cpu")
    same_curve(json.loads(out)["curve"], alone.curve, rel_tol=0.1 if distilled else 1e-4)
    if distilled:  # the error of a site is relative to what a process sees, and steers what comes after the first step
        assert math.isclose(json.loads(out)["curve"][0]["kl"], alone.curve[0]["kl"], rel_tol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [("no data", "no such file"), ("in the way", "with contents"), ("diverged", "to stay finite")],
)
def test_a_refusal_is_said_once(name: str, said: str, launched: dict[str, Any]) -> None:
    (code, out, err), second = launched[name]
    assert code == 2 and out == "" and said in err.splitlines()[-1] and second == [2, "", ""]
    assert len([line for line in err.splitlines() if line.startswith("headfold: ")]) == 1


def test_one_goes_on_from_what_two_left(place: Path, launched: dict[str, Any], tmp_path: Path) -> None:
    asked = how(place, "llama", distilled=False)
    found = uptrain(out=place / "stopped", **asked, resume=True)
    alone = uptrain(out=tmp_path / "out", **asked)
    assert found.resumed_at == 2
    same_curve(found.curve, alone.curve, rel_tol=1e-4)


def test_sharded_training_is_that_of_one_process(place: Path, launched: dict[str, Any], tmp_path: Path) -> None:
    asked = how(place, "llama", distilled=False)
    assert not (place / "unsharded").exists() and not (place / "unsharded.partial").exists()
    for out, train, resumed in (("sharded", "lora", 0), ("shards", "attention", 2)):
        alone = uptrain(out=tmp_path / out, **asked, train=train)
        record = json.loads((place / out / "training.json").read_text())
        assert record["resumed_at"] == resumed
        same_curve(record["curve"], alone.curve, rel_tol=1e-3)
        weights, expected = (load_file(directory / "model.safetensors") for directory in (place / out, alone.out))
        assert weights.keys() == expected.keys()
        assert all(torch.allclose(weights[name], tensor, rtol=1e-2, atol=1e-4) for name, tensor in expected.items())


def test_shards_are_not_taken_for_a_whole(place: Path, tmp_path: Path) -> None:
    from headfold.train.sharding import check_sharding
    from headfold.train.trainer import Uptrainer

    class Whole(Uptrainer):
        is_fsdp_enabled = False

        def __init__(self) -> None:
            pass

    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(UserError, match="launch with FSDP, as before"):
        check_sharding(Whole(), "adamw", tmp_path)
