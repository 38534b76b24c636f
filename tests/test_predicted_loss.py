"""What `headfold plan` says of the loss: what measured sites lose in sum, nothing where none was measured, and the command that folds."""

# ruff: noqa: F811 - fixtures are arguments

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from test_budget import stats  # noqa: F401 - a fixture
from test_cli import copy, model, run  # noqa: F401 - fixtures
from tiny import FOREIGN, stock_model, tiny_checkpoint, tiny_sample

import headfold
from headfold.budget.curves import loses_nats
from headfold.checkpoint.config import read_config
from headfold.core.errors import UserError
from headfold.core.plan import Plan
from headfold.evaluate.verify import model_output


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


_ONE_OF_EACH_ENDING = {
    re.sub(r"^.*?(?=For[A-Z]|LMHead|MTModel|Model)", "", foreign.model_class): name for name, foreign in FOREIGN.items()
}


@pytest.mark.parametrize("name", sorted({*_ONE_OF_EACH_ENDING.values(), "xlm-roberta", "clip"} - {"electra"}))
def test_losses_are_nats_where_logits_are_compared(name: str) -> None:
    """An ELECTRA has one logit for each token, which is no distribution over words."""
    path = tiny_checkpoint(name)
    output, _ = model_output(stock_model(path), tiny_sample(name))
    assert loses_nats(read_config(path)) == (output == "logits")
