"""What `headfold plan` says of the loss: what measured sites lose in sum, nothing where none was measured, and the command that folds."""

# ruff: noqa: F811 - fixtures are arguments

import json
import math
import shlex
from pathlib import Path

import pytest
from test_budget import stats  # noqa: F401 - a fixture
from test_cli import copy, model, run  # noqa: F401 - fixtures

import headfold
from headfold.budget.curves import loses_nats
from headfold.core.errors import UserError
from headfold.core.plan import Plan


def test_a_budget_says_what_it_is_predicted_to_lose_and_how_to_go_on(
    run, model: Path, stats: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "the plan.json"
    done = run("plan", model, plan, "--stats", stats, "--kv-budget", "50%", "--allowed", "1,2", "--no-refit")
    assert done.code == 0, done.err
    made, measured = Plan.load(plan), json.loads((tmp_path / "the plan.sensitivity.json").read_text())["loss_increase"]
    alone = [measured[site].get(str(count), 0.0) for site, count in made.num_kv_heads.items()]  # all heads lose nothing
    assert made.predicted_loss_increase == pytest.approx(sum(alone)) and sum(alone) > 0
    assert f"predicted loss increase: {sum(alone):.3g} nats" in done.out
    said = done.out.splitlines()[-1]
    ends = f"{model.name}-gqa", "--plan", str(plan), "--stats", str(stats), "--no-refit"
    assert shlex.split(said) == ["next:", "headfold", "fold", str(model), *ends]
    assert run("fold", model, tmp_path / "out", *ends[1:]).code == 0
    assert Plan.load(tmp_path / "out" / "plan.json") == made


def test_without_measured_sites_no_loss_is_predicted(run, model: Path, stats: Path, tmp_path: Path) -> None:
    """Predicted errors of single layers say too little of the loss."""
    done = run("plan", model, tmp_path / "plan.json", "--kv-heads", "2", "--stats", stats, "--no-refit")
    assert done.code == 0 and "predicted loss" not in done.out and done.out.rstrip().endswith("--no-refit")
    assert "predicted_loss_increase" not in json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("loss", [-1.0, "0.1", math.inf, True])
def test_a_loss_that_no_plan_has_is_refused(model: Path, loss: object) -> None:
    found = headfold.plan(model, kv_heads=2, group="contiguous", merge="mean").to_json()
    with pytest.raises(UserError, match="predicted_loss_increase"):
        Plan.from_json({**found, "predicted_loss_increase": loss})


def test_losses_of_models_without_logits_are_no_nats(tmp_path: Path) -> None:
    assert [loses_nats({"architectures": [name]}) for name in ("GPT2LMHeadModel", "BertModel")] == [True, False]
