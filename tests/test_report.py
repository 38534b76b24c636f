"""Reports: colours and bars for a terminal, numbers and lines of text for everything else."""

import io
import time
from dataclasses import dataclass
from typing import get_args

import pytest

from headfold.core.heads import FreedomKind, QueryOrder
from headfold.reports import progress, views
from headfold.reports.progress import ProgressReport, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class Site:
    name: str
    key: dict[str, float]
    value: dict[str, float]


SITES = [
    Site("layers.0.self", {"1/2": 0.01, "1/4": 0.3}, {"1/2": 0.0, "1/4": 0.8}),
    Site("layers.1.self", {"1/2": 0.123}, {"1/2": 0.04}),
]


def test_a_stage_that_does_not_advance_is_not_silent() -> None:
    to = io.StringIO()
    with ProgressReport(to, interval=0.05) as report:
        report("refit", 0, 1000)
        time.sleep(0.3)
        report("refit", 420, 1000)
        time.sleep(0.3)
    lines = to.getvalue().splitlines()
    assert lines[0] == "refit: 0 %, running for 0:00"
    assert any(
        line.startswith("refit: 42 %, ") and " tokens or items/s, 0:0" in line and line.endswith(" left")
        for line in lines
    )
    assert lines[-1].startswith("refit: 1,000 tokens or items in ") and len(lines) < 20


def test_the_time_before_the_first_stage_and_after_the_last_count_is_not_silent() -> None:
    to = io.StringIO()
    with ProgressReport(to, interval=0.05) as report:
        time.sleep(0.2)
        report("plan", 7, 7)
        time.sleep(0.2)
        report("embed", 12, 0)
        time.sleep(0.2)
    lines = to.getvalue().splitlines()
    assert lines[0] == "starting, running for 0:00"
    assert "plan: 100 %, finishing, running for 0:00" in lines
    assert "embed: 12 items, running for 0:00" in lines and lines[-1].startswith("embed: 12 items in ")


def test_nothing_is_printed_after_the_end_or_by_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    to = io.StringIO()
    with ProgressReport(to, interval=0.02) as report:
        report("plan", 1, 1)
    said = to.getvalue()
    monkeypatch.setattr(progress, "is_main", lambda: False)
    with ProgressReport(to, interval=0.02) as report:
        report("plan", 0, 7)
        report.say("a line")
        time.sleep(0.1)
    assert said.startswith("plan: ") and to.getvalue() == said


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_brief_report_has_regular_lines_alone(kind: type[io.StringIO]) -> None:
    to = kind()
    with ProgressReport(to, brief=True) as report:
        report("plan", 0, 7)
        report.say("a line")
        report("fit", 1, 7)
    assert not to.getvalue()
    with ProgressReport(to, brief=True, interval=0.05) as report:
        report("refit", 420, 1000)
        time.sleep(0.2)
    lines = to.getvalue().splitlines()
    assert lines and all(line.startswith("refit: 42 %, ") and line.endswith(" left") for line in lines)


def test_times_left() -> None:
    assert [clock(seconds) for seconds in (35, 727, 3723)] == ["0:35", "12:07", "1:02:03"]


def test_errors_are_numbers_in_a_file_and_bars_on_a_terminal() -> None:
    file, terminal = io.StringIO(), Terminal()
    for to in (file, terminal):
        views.show_predicted_errors(SITES, "norm gains alone", to)
    rows = [line.split() for line in file.getvalue().splitlines()]
    assert ["layers.0.self", "1.00", "%", "30.0", "%", "0.00", "%", "80.0", "%"] in rows
    assert ["layers.1.self", "12.3", "%", "4.00", "%"] in rows
    assert not set(views.BARS) & set(file.getvalue()) and set(views.BARS) & set(terminal.getvalue())
    assert "worst 30.0 % at layers.0.self" in terminal.getvalue()
    assert [views.level(share) for share in (0.0, 1 / 64, 0.25, 1.0, 2.0)] == [0, 1, 4, 7, 7]


def test_methods_are_a_table_on_a_terminal() -> None:
    summaries = {"--merge": {"mean": "The mean of the heads.", "absorb": "Another."}, "--group": {"swap": "A third."}}
    file, terminal = io.StringIO(), Terminal()
    for to in (file, terminal):
        views.show_methods(summaries, to)
    assert file.getvalue().splitlines()[:2] == ["--merge", "  mean    The mean of the heads."]
    for word in ("option", "--group", "absorb", "A third."):
        assert word in terminal.getvalue()


def test_every_position_of_keys_and_order_of_heads_has_words() -> None:
    assert set(views._POSITIONS) == set(get_args(FreedomKind)) and set(views._ORDERS) == set(get_args(QueryOrder))
    assert views._in_words({"any": "not rotated"}, "any on 8 of 16 dims") == "not rotated (on 8 of 16 dims)"
