"""Budgets: the spread is the best there is, losses are measured on one scale, and what cannot be had is said in a line."""

# ruff: noqa: F811 - fixtures are arguments

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import copy, model, run  # noqa: F401 - fixtures
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_tokens

import headfold
from headfold import planning
from headfold.budget.allocation import CountOption, allocate, allocate_qcqa, pareto_front, total
from headfold.budget.curves import interpolated_loss, measured_counts
from headfold.budget.request import BudgetRequest, _share
from headfold.conversion.folded_config import folded_config as config_of
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.core.plan import Plan
from headfold.evaluate.sensitivity import Divergence, measure_sites_alone, replaced_parameters
from headfold.families.spec import Site


@st.composite
def curves(draw: st.DrawFn) -> dict[str, list[CountOption]]:
    """A few sites, each with counts whose loss falls as their bytes rise."""
    made = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        width, scale = draw(st.sampled_from([16, 24])), draw(st.sampled_from([1e2, 1e4, 1e8]))
        losses = sorted(draw(st.lists(st.integers(1, 1000), min_size=3, max_size=3)), reverse=True)
        made[name] = [CountOption(n, n * width, x / scale) for n, x in zip((1, 2, 4), losses, strict=True)] + [
            CountOption(8, 8 * width, 0.0)
        ]
    return made


def every_spread(options: dict[str, list[CountOption]]) -> list[dict[str, int]]:
    counts = itertools.product(*([option.num_kv_heads for option in listed] for listed in options.values()))
    return [dict(zip(options, found, strict=True)) for found in counts]


@settings(max_examples=60, deadline=None)
@given(curves(), st.floats(0.13, 1))
def test_no_spread_within_the_budget_loses_less(options: dict[str, list[CountOption]], share: float) -> None:
    limit = share * sum(listed[-1].kv_bytes for listed in options.values())
    found = total(options, allocate(options, max_bytes=limit))
    assert found.kv_bytes <= limit
    within = [total(options, made) for made in every_spread(options)]
    assert found.loss_increase <= min(one.loss_increase for one in within if one.kv_bytes <= limit) + 1e-12


@settings(max_examples=60, deadline=None)
@given(curves(), st.floats(0, 20))
def test_no_spread_within_the_loss_takes_less(options: dict[str, list[CountOption]], limit: float) -> None:
    found = total(options, allocate(options, max_loss=limit))
    assert found.loss_increase <= limit + 1e-12
    within = [total(options, made) for made in every_spread(options)]
    best = min(
        (one.kv_bytes, one.loss_increase) for one in within if one.loss_increase <= limit
    )  # of equal bytes the least loss
    assert (found.kv_bytes, found.loss_increase) == pytest.approx(best, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(curves())
def test_a_frontier_falls(options: dict[str, list[CountOption]]) -> None:
    points = [total(options, made) for made in pareto_front(options)]
    assert points[-1].loss_increase == 0
    for less, more in itertools.pairwise(points):
        assert less.kv_bytes < more.kv_bytes and less.loss_increase > more.loss_increase


@settings(max_examples=5, deadline=None)
@given(curves())
def test_the_second_stage_of_qcqa_is_within_the_budget_and_not_better(options: dict[str, list[CountOption]]) -> None:
    limit = 0.6 * sum(listed[-1].kv_bytes for listed in options.values())
    theirs = allocate_qcqa(options, limit, generations=10)
    assert set(theirs.values()) <= {1, 8} and total(options, theirs).kv_bytes <= limit
    assert (
        total(options, allocate(options, max_bytes=limit)).loss_increase <= total(options, theirs).loss_increase + 1e-4
    )


def test_budgets_that_nothing_meets_are_refused() -> None:
    options = {"a": [CountOption(1, 16, 2.0), CountOption(2, 32, 1.0)]}
    with pytest.raises(UserError, match="fewest allowed K/V heads"):
        allocate(options, max_bytes=8)
    with pytest.raises(UserError, match="most allowed K/V"):
        allocate(options, max_loss=0.5)
    with pytest.raises(UserError, match="fewest allowed K/V heads"):
        allocate_qcqa(options, 8)


def test_loss_between_measured_counts_follows_the_prediction() -> None:
    predicted = {1: 0.8, 2: 0.4, 4: 0.2, 8: 0.1, 16: 0.0}
    measured = {1: 3 * 0.8**2, 4: 3 * 0.2**2}
    for count, error in predicted.items():
        assert math.isclose(interpolated_loss(count, predicted, measured), 3 * error**2, rel_tol=1e-9), count
    assert interpolated_loss(2, predicted, {4: 0.1}) == pytest.approx(0.2)  # of one point: in proportion


def test_shares() -> None:
    assert _share("25%") == 0.25 and _share("1/4") == 0.25 and _share("0.5") == 0.5
    for text in ("0", "101%", "1/0", "much"):
        with pytest.raises(UserError, match="--kv-budget"):
            _share(text)


def site_of(num_kv_heads: int, query_order: str = "free") -> Site:
    site = open_source(tiny_checkpoint("llama")).sites[0]
    return dataclasses.replace(site, num_kv_heads=num_kv_heads, query_order=query_order)


def test_counts_are_those_that_engines_take() -> None:
    assert BudgetRequest().counts(site_of(8)) == [1, 2, 4]
    assert BudgetRequest(allowed=(2, 3, 4)).counts(site_of(8)) == [2, 4]
    assert BudgetRequest(tp=4).counts(site_of(32)) == [4, 8, 16]
    with pytest.raises(UserError, match="--tp 16"):
        BudgetRequest(tp=16).counts(site_of(8))


def test_devices_that_do_not_divide_a_layers_own_count_are_refused() -> None:
    """A layer may keep all its heads, and those would not lie on three devices."""
    with pytest.raises(UserError, match="--tp 3"):
        BudgetRequest(unequal=True, tp=3).counts(site_of(8))


def test_every_count_may_be_used_where_groups_may_differ_in_size() -> None:
    assert BudgetRequest(unequal=True).counts(site_of(6)) == [1, 2, 3, 4, 5]
    assert BudgetRequest(unequal=True, allowed=(3, 4, 8), tp=2).counts(site_of(8)) == [4]
    assert BudgetRequest(unequal=True).counts(site_of(8, "fixed")) == [1, 2, 4]


@pytest.mark.parametrize(("most", "number"), [(2, 3), (7, 5), (31, 5), (63, 5)])
def test_measured_counts_reach_from_the_least_to_the_most(most: int, number: int) -> None:
    """And nowhere leave a gap much wider than even steps of the logarithm would."""
    counts = list(range(1, most + 1))
    found = measured_counts(counts, number)
    assert found[0] == 1 and found[-1] == most and set(found) <= set(counts) and len(found) == min(number, most)
    assert all(
        after / before <= max(2, 1.35 * most ** (1 / (number - 1))) for before, after in itertools.pairwise(found)
    )


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "vit"])
def test_a_divergence_is_zero_or_positive(name: str) -> None:
    """Of the unchanged model none; of a changed one some, and it is the original again afterwards."""
    tiny = stock_model(tiny_checkpoint(name))
    divergence = Divergence(tiny, tiny_sample(name, 4))
    parameter = next(
        n for n, p in tiny.named_parameters() if p.dim() == 2 and ("attention" in n.lower() or "attn" in n)
    )
    before = tiny.get_parameter(parameter).clone()
    assert divergence() == pytest.approx(0, abs=1e-9)
    with replaced_parameters(tiny, {parameter: before * 1.5}):
        hurt = divergence()
    assert hurt > 1e-8 and torch.equal(tiny.get_parameter(parameter), before)
    found = measure_sites_alone(
        tiny,
        tiny_sample(name, 4),
        {
            ("a", 1): lambda: replaced_parameters(tiny, {parameter: before * 1.5}),
            ("a", 2): lambda: replaced_parameters(tiny, {parameter: before}),
        },
    )
    assert found["a"][1] == pytest.approx(hurt) and found["a"][2] == pytest.approx(0, abs=1e-9)


def test_a_divergence_is_that_per_position() -> None:
    tiny = stock_model(tiny_checkpoint("llama"))
    sample = {"input_ids": tiny_tokens(3, 10)}
    divergence = Divergence(tiny, sample)
    weight = tiny.lm_head.weight.clone()
    with torch.no_grad():
        p = tiny(**sample).logits.log_softmax(-1)
        with replaced_parameters(tiny, {"lm_head.weight": weight * 1.3}):
            q, found = tiny(**sample).logits.log_softmax(-1), divergence()
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.fixture(scope="module")
def stats(model: Path) -> Path:
    path = model.parent / "budget-stats.safetensors"
    headfold.calibrate(model, path, calibration=str(model.parent / "text.txt"), tokens=1024)
    return path


def test_a_budget_becomes_a_plan_and_a_fold(run, model: Path, stats: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    words = ("plan", model, plan, "--stats", stats, "--kv-budget", "50%")
    done = run(*words)
    assert done.code == 0, done.err
    made = Plan.load(plan)
    assert sum(made.num_kv_heads.values()) <= 8
    measured = json.loads((tmp_path / "plan.sensitivity.json").read_text())
    assert set(measured["loss_increase"]) == set(made.sites) and all(
        set(row) == {"1", "2", "4"} for row in measured["loss_increase"].values()
    )
    before = (tmp_path / "plan.sensitivity.json").stat().st_mtime_ns
    assert run(*words, "--force", "--workers", 2).code == 0 and Plan.load(plan) == made
    assert (tmp_path / "plan.sensitivity.json").stat().st_mtime_ns == before  # read, not measured again
    assert run("fold", model, tmp_path / "out", "--plan", plan, "--stats", stats, "--no-refit").code == 0
    assert headfold.load(tmp_path / "out") is not None


def test_groups_of_several_sizes_spread_a_budget_more_finely(run, model: Path, stats: Path, tmp_path: Path) -> None:
    plan, words = tmp_path / "plan.json", ("--stats", stats, "--group", "swap:unequal=true")
    done = run("plan", model, plan, *words, "--kv-bytes", "704")  # of 1,024, two sites of 8 heads
    assert done.code == 0, done.err
    made = Plan.load(plan)
    assert sum(made.num_kv_heads.values()) == 11
    measured = json.loads((tmp_path / "plan.sensitivity.json").read_text())["loss_increase"]
    assert all(set(row) == {"1", "2", "3", "4", "7"} for row in measured.values())
    assert run("fold", model, tmp_path / "out", "--plan", plan, "--stats", stats, "--json").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert headfold.load(tmp_path / "out") is not None and "per_layer_config" in config


def test_what_else_lies_in_a_file_of_sensitivities_changes_nothing(
    run, model: Path, stats: Path, tmp_path: Path
) -> None:
    words = ("--stats", stats, "--kv-budget", "50%", "--allowed", "1,2", "--force")
    assert (
        run(
            "plan",
            model,
            tmp_path / "all.json",
            "--stats",
            stats,
            "--kv-budget",
            "50%",
            "--sensitivity",
            tmp_path / "s",
        ).code
        == 0
    )
    for name in ("s", "own"):
        assert run("plan", model, tmp_path / f"{name}.json", *words, "--sensitivity", tmp_path / name).code == 0
    assert Plan.load(tmp_path / "s.json") == Plan.load(tmp_path / "own.json")
    spoiled = (tmp_path / "s").read_text().replace('"1":', '"1": NaN, "64":')
    (tmp_path / "s").write_text(spoiled)
    refused = run("plan", model, tmp_path / "s.json", *words, "--sensitivity", tmp_path / "s")
    assert refused.code == 2 and "expected sensitivities" in refused.err


def test_an_encoder_has_no_budget(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave --encoder out"):
        BudgetRequest(kv_budget="50%").check_reachable(open_source(tiny_checkpoint("t5"), True))


@pytest.mark.parametrize("name", ["swap:unequal=true", "kmeans"])
def test_one_count_that_splits_unequally_is_planned_and_folded(
    run, model: Path, stats: Path, tmp_path: Path, name: str
) -> None:
    words = ("--kv-heads", "3", "--group", name, "--stats", stats)
    assert run("plan", model, tmp_path / "plan.json", *words).code == 0
    assert set(Plan.load(tmp_path / "plan.json").num_kv_heads.values()) == {3}
    done = run("fold", model, tmp_path / "out", *words, "--no-refit")
    assert done.code == 0 and "verified" in done.out, done.err


def test_a_loss_becomes_a_plan(run, model: Path, stats: Path, tmp_path: Path) -> None:
    words = ("plan", model, tmp_path / "plan.json", "--stats", stats, "--sensitivity", tmp_path / "s.json", "--force")
    assert run(*words, "--max-loss-increase", 1e-9).code == 0
    assert set(Plan.load(tmp_path / "plan.json").num_kv_heads.values()) == {8}
    assert run(*words, "--max-loss-increase", 1e9).code == 0
    assert set(Plan.load(tmp_path / "plan.json").num_kv_heads.values()) == {1}
    assert run(*words, "--kv-bytes", "600").code == 0  # of 1,024
    assert sum(Plan.load(tmp_path / "plan.json").num_kv_heads.values()) <= 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--kv-heads, or one of --kv-budget"),
        (("--kv-heads", "2", "--kv-budget", "50%"), "both"),
        (("--kv-budget", "50%", "--kv-bytes", "1KiB"), "exclude each other"),
        (("--kv-budget", "5%"), "fewest allowed K/V heads"),
        (("--kv-budget", "150%"), "at most 100 %"),
        (("--kv-bytes", "lots"), "40KiB"),
        (("--kv-budget", "50%", "--allowed", "3,5"), "--allowed 3,5"),
        (("--kv-budget", "50%", "--tp", "16"), "--tp 16"),
        (("--kv-heads", "2", "--tp", "2"), "go with a budget"),
        (("--max-loss-increase", "0.1", "--spread", "qcqa"), "--kv-budget"),
        (("--kv-budget", "50%", "--spread", "fair"), "exact, qcqa"),
        (("--kv-budget", "50%", "--group", "evolv"), "evolve"),
    ],
)
def test_what_no_plan_can_be_is_refused_in_a_line(
    run, model: Path, stats: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:  # fmt: skip
    refused = run("plan", model, tmp_path / "plan.json", "--stats", stats, *words)
    assert refused.code == 2 and said in refused.err and not (tmp_path / "plan.json").exists()
    assert len(refused.err.strip().splitlines()[-1:]) == 1


def test_a_budget_is_refused_at_once_where_layers_cannot_differ(tmp_path: Path) -> None:
    """phi3's q, k and v are one tensor that its own class splits by one count; a llama's lie apart."""
    for name, said in (("phi3", "they are one tensor on disk"), ("llama", "headfold calibrate")):
        with pytest.raises(UserError, match=said):
            headfold.plan(tiny_checkpoint(name), tmp_path / "plan.json", kv_budget="50%")
    assert not list(tmp_path.iterdir())


def test_sensitivities_of_something_else_are_refused(run, model: Path, stats: Path, tmp_path: Path) -> None:
    words = (
        "plan",
        model,
        tmp_path / "plan.json",
        "--stats",
        stats,
        "--kv-budget",
        "50%",
        "--sensitivity",
        tmp_path / "s.json",
    )
    assert run(*words).code == 0
    refused = run(*words, "--force", "--merge", "mean")
    assert refused.code == 2 and "of this model, data and method, got others" in refused.err
    (tmp_path / "s.json").write_text("[]")
    assert "that this version of headfold wrote" in run(*words, "--force").err


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_frontier_has_a_plan_for_every_point(run, model: Path, stats: Path, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("headfold.verbs.frontier.front_page", killed)
        assert run("frontier", model, tmp_path / "front", "--stats", stats, "--measure", 3).code == 130
    shown = run("frontier", model, tmp_path / "front", "--stats", stats, "--measure", 3)
    assert (tmp_path / "front" / "report.html").is_file()
    assert shown.code == 0 and "rank correlation" in shown.out, shown.err
    found = json.loads((tmp_path / "front" / "frontier.json").read_text())
    for point in found["points"]:
        plan = Plan.load(tmp_path / "front" / point["plan"])
        assert sum(plan.num_kv_heads.values()) * 2 * 8 * 4 == point["kv_bytes_per_token"]
    assert sum(point["measured"] is not None for point in found["points"]) >= 3
    assert (tmp_path / "front" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    refused = run("frontier", model, tmp_path / "front", "--stats", stats)
    assert refused.code == 2 and "--force" in refused.err


def test_points_of_several_widths_compete(run, model: Path, stats: Path, tmp_path: Path) -> None:
    words = (
        "frontier",
        model,
        tmp_path / "front",
        "--stats",
        stats,
        "--measure",
        1,
        "--head-dim-multiple",
        "auto",
        "--no-refit",
    )
    shown = run(*words)
    assert shown.code == 0 and "× 2" in shown.out, shown.err
    found = json.loads((tmp_path / "front" / "frontier.json").read_text())["points"]
    best = [point for point in found if not point["uniform"]]
    assert len({point["head_dim_multiple"] for point in best}) > 1
    assert [p["predicted"] for p in best] == sorted((p["predicted"] for p in best), reverse=True)
    for point in found:
        dims = {site.head_dim for site in Plan.load(tmp_path / "front" / point["plan"]).sites.values()}
        assert dims == {8 * point["head_dim_multiple"]}
    before = {path.name: path.read_bytes() for path in (tmp_path / "front").iterdir()}
    for refused in (("--merge", "absorb:distances=false"), ("--head-dim-multiple", "3"), ("--allowed", "5")):
        assert run(*words[:-3], "--no-refit", "--force", *refused).code == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "front").iterdir()} == before
    assert run(*words[:-3], "--force", "--no-refit").code == 0  # files of other multiples go
    names = {point["plan"] for point in json.loads((tmp_path / "front" / "frontier.json").read_text())["points"]}
    assert {path.name for path in (tmp_path / "front").glob("plan-*.json")} == names


def test_counts_that_the_files_cannot_hold_are_refused_by_the_plan(tmp_path: Path) -> None:
    """q, k and v of Phi-3 are one tensor: one count for all layers."""
    source = open_source(tiny_checkpoint("phi3", torch.float32))
    choices = planning.choices(
        source.sites, source.checkpoint.read, lambda site: [2, 4], grouping=planning.parse_group("contiguous"), merge="mean", stats=None
    )  # fmt: skip
    for counts, possible in (((2, 2), True), ((2, 4), False)):
        made = planning.assemble(source.sites, list(zip(choices, counts, strict=True)), "contiguous", "", 0, None)
        if possible:
            assert config_of(source, made)["num_key_value_heads"] == 2
        else:
            with pytest.raises(UserError, match="as many at every site"):
                config_of(source, made)
