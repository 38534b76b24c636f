"""Comparisons: every method in one table, rows kept and never mixed, and what is skipped is told."""

# ruff: noqa: F811 - fixtures are arguments

import json
from pathlib import Path

import pytest
from owners import refused_while_owned
from test_budget import stats  # noqa: F401 - fixture
from test_cli import copy, model, run  # noqa: F401 - fixtures

from headfold.budget import points
from headfold.checkpoint.ownership import has_contents, lock_inside
from headfold.comparison import STATISTICS, earlier_rows
from headfold.conversion.comparison_methods import METHODS
from headfold.core.errors import UserError
from headfold.stats_file import StatsFile
from headfold.verbs import compare as comparing
from headfold.verbs.compare import compare
from headfold.verbs.frontier import frontier


def test_methods_are_compared_and_rows_kept(run, model: Path, stats: Path, tmp_path: Path) -> None:
    text = model.parent / "text.txt"
    words = ("compare", model, "--kv-heads", "4,1", "--stats", stats, "--text", text, "--out", tmp_path / "c")
    first = json.loads(run(*words, "--methods", "mean,absorb", "--json").out)
    assert [(row["method"], row["num_kv_heads"]) for row in first] == [
        ("mean", 4),
        ("absorb", 4),
        ("mean", 1),
        ("absorb", 1),
    ]
    needed = {"method", "num_kv_heads", "kv_bytes_per_token", "metric", "value", "loss_increase", "kl", "seconds"}
    assert all(needed <= row.keys() for row in first)
    assert first[1]["loss_increase"] == pytest.approx(first[1]["value"] - first[1]["original"])
    shown = run(*words, "--methods", "mean,absorb,absorb+refit", "--plot", tmp_path / "c.png")
    assert shown.code == 0 and "absorb+refit" in shown.out and " *" in shown.out, shown.err
    page = tmp_path / "c" / "report.html"
    assert f"wrote {page}" in shown.out if page.exists() else "pip install 'headfold[report]'" in shown.out
    again = json.loads(run(*words, "--methods", "mean,absorb", "--json").out)
    assert again == first  # seconds and all: not computed again
    assert (tmp_path / "c.png").exists() and not (tmp_path / "c" / comparing.FOLDED).exists()
    refused = run(*words, "--limit", 50)
    assert refused.code == 2 and "--out" in refused.err


def test_a_comparison_that_died_in_its_first_row_goes_on(
    run, model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    text, out = tmp_path / "text.txt", tmp_path / "c"
    text.write_text((model.parent / "text.txt").read_text())
    words = dict(methods=["mean"], stats=stats, text=str(text), out=out)
    with monkeypatch.context() as patched:
        patched.setattr(comparing, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(model, [2], **words)
    assert len(compare(model, [2], **words).rows) == 1
    text.write_text(text.read_text()[::-1])
    with pytest.raises(UserError, match="of the same data and model, got others"):
        compare(model, [2], **words)


def test_calibration_and_measurement_have_the_context(model: Path, tmp_path: Path) -> None:
    text = str(model.parent / "text.txt")
    compare(model, [2], methods=["mean"], calibration=text, tokens=256, text=text, context=16, out=tmp_path / "c")
    assert StatsFile(tmp_path / "c" / STATISTICS).metadata["context"] == "16"


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_skipped_methods_are_told_and_all_of_them_an_error(
    run, model: Path, stats: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(METHODS, "mean", {"merge": "nothing", "group": "contiguous"})
    words = (
        "compare",
        model,
        "--kv-heads",
        2,
        "--stats",
        stats,
        "--text",
        model.parent / "text.txt",
        "--out",
        tmp_path / "c",
        "--json",
    )
    told = run(*words, "--methods", "mean,first")
    assert told.code == 0 and len(json.loads(told.out)) == 1 and "skipped: mean at 2" in told.err
    refused = run(*words[:-2], tmp_path / "d", "--methods", "mean")
    assert refused.code == 2 and "no method" in refused.err
    beside = run(*words, "--methods", "first", "--calibration", model.parent / "text.txt")
    assert beside.code == 2 and "exclude each other" in beside.err


def test_every_method_compares(model: Path, stats: Path, tmp_path: Path) -> None:
    found = compare(
        model, [2], methods=list(METHODS), stats=stats, text=str(model.parent / "text.txt"), out=tmp_path / "c"
    )
    assert [row.method for row in found.rows] == list(METHODS) and not found.skipped
    assert len({row.kv_bytes_per_token for row in found.rows}) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--kv-heads"),
        (("--kv-heads", "3"), "choose"),
        (("--kv-heads", "2", "--methods", "men"), "mean"),
        (("--kv-heads", "2", "--methods", "random+refit"), "no method"),
        (("--kv-heads", "2", "--plot", "x.xyz"), ".png"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused = run("compare", model, *words)
    assert refused.code == 2 and said in refused.err and not list(tmp_path.iterdir())


def test_a_directory_that_another_comparison_owns_is_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "c", dict(methods=["mean"], stats=stats, text=str(model.parent / "text.txt"), limit=64)
    refused_while_owned(lambda: compare(model, [2], out=out, **how), out, lock_inside(out))
    assert list(out.iterdir()) == []
    compare(model, [2], out=out, **how)
    refused_while_owned(lambda: compare(model, [2], out=out, force=True, **how), out, lock_inside(out))


def test_a_directory_that_another_frontier_owns_is_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "front"
    for force in (False, True):
        refused_while_owned(lambda how=force: frontier(model, out, stats=stats, force=how), out, lock_inside(out))
    frontier(model, out, stats=stats, measured=1, refit=False)
    assert (out / "frontier.json").exists() and not lock_inside(out).exists()


def test_a_frontier_that_was_killed_while_it_was_written_is_made_by_the_same_command(
    run, model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = tmp_path / "front"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(points, "plot_frontier", killed)
    words = ("frontier", model, front, "--stats", stats, "--no-refit", "--measure")
    assert run(*words, 1).code == 130 and (front / "frontier.json").is_file()
    monkeypatch.undo()
    (front / "plan-99.json").write_text("mine")
    monkeypatch.setattr(points, "plot_frontier", lambda path, *_, **__: path.touch())
    shown = run(*words, 0)
    page = front / "report.html"
    assert shown.code == 0
    assert f"wrote {page}" in shown.out if page.exists() else "pip install 'headfold[report]'" in shown.out
    assert run(*words, 0).code == 2  # finished, so that it is not replaced unasked
    names = {point["plan"] for point in json.loads((front / "frontier.json").read_text())["points"]}
    rest = {"frontier.json", "frontier.png", "sensitivity.json", "plan-99.json"}
    assert {path.name for path in front.iterdir()} - {"report.html"} == names | rest


def test_what_a_kill_left_of_the_first_file_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".compare.json.headfold-partial").write_text("{")
    assert not has_contents(tmp_path) and earlier_rows(tmp_path, {}, force=False) == []
    (tmp_path / "compare.json.headfold-partial").write_text("mine")
    assert has_contents(tmp_path)
