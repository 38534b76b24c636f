"""Results that the command line printed with --json are read back as they were, and records refuse what they do not declare."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from results import BENCH, CLASSES, COMPARED, EVALUATION, PAIRED, TASKS

from headfold.cli.output import _finite
from headfold.comparison import MethodRow
from headfold.core.errors import UserError
from headfold.core.records import record
from headfold.evaluate.perplexity import Evaluation
from headfold.pages import charts, costs, losses, positions
from headfold.pages.contents import Contents, MethodTable
from headfold.pages.elements import as_script
from headfold.pages.results import DataResult, EngineCheck, EngineRow, Paired, labels, read_result
from headfold.serving.engine import all_engines
from headfold.serving.result import CheckResult, CheckRow
from headfold.verbs.evaluate import facts


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(_finite(value), default=str))
    return path


def test_results_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert read_result(written(file, facts(EVALUATION))) == EVALUATION
    assert read_result(written(file, TASKS.to_json())) == TASKS
    assert read_result(written(file, BENCH.to_json())) == BENCH
    assert read_result(written(file, PAIRED)) == Paired("text.txt", COMPARED.level, COMPARED.rows)
    measured = read_result(written(file, CLASSES.to_json()))
    assert isinstance(measured, DataResult) and measured.measures["accuracy"] == (0.5, 0.75)
    assert measured.measures.keys() == {"accuracy", "cross_entropy", "kl", "agreement"}
    rows = tuple(CheckRow(engine, "serve") for engine in all_engines().values())
    checked = read_result(written(file, CheckResult(Path("fold"), rows, 512, None, None).to_json()))
    assert isinstance(checked, EngineCheck) and [row.engine for row in checked.rows] == [*all_engines()]


def test_a_bin_without_tokens_is_left_out() -> None:
    short = Evaluation(**{**asdict(EVALUATION), "nll_by_position": (3.0, math.nan)})
    section = positions.section(Contents(results=[short]))
    assert section is not None
    shown = section.charts["positions"]["data"]["values"]
    assert [(row["model"], row["end"], row["loss"]) for row in shown] == [
        ("tiny", 16, 2.75), ("tiny", 32, 1.75), ("tiny-half", 16, 3.0)
    ]  # fmt: skip


def test_results_are_shown() -> None:
    contents = Contents(results=[EVALUATION, COMPARED_AS_READ, TASKS, BENCH, MEASURED, CHECKED])
    section = losses.section(contents)
    assert section is not None
    text = "".join(section.parts)
    assert all(
        cell in text
        for cell in ("+0.2500", "12.182", "75.0 %", "[+0.2500, +0.7500]", "worse", "[0.2500, 0.7500]", "75.00%")
    )
    shown = costs.section(contents)
    assert shown is not None and shown.charts["speed-0"]["data"]["values"][0]["tokens"] == 100.0
    assert all(cell in "".join(shown.parts) for cell in ("10 ms", "a note", "vllm 1.0", "the same", "512 B"))


COMPARED_AS_READ = Paired("text.txt", COMPARED.level, COMPARED.rows)
MEASURED = DataResult("images", "a", "b", "folder", 10, {"accuracy": (0.5, 0.75)})
CHECKED = EngineCheck(
    "a", [EngineRow("vllm", "", "", "1.0", tokens_per_second=10.0, kv_bytes_per_token=512.0, kl=1e-12, same=True)]
)


@dataclass(frozen=True)
class _Inner:
    name: str


@dataclass(frozen=True)
class _Outer:
    count: int
    share: float
    inner: list[_Inner]
    pair: tuple[float, float] | None = None
    named: dict[str, int] = field(default_factory=dict)
    flag: bool = False


RIGHT = {
    "count": 1,
    "share": 2,
    "inner": [{"name": "a", "more": 0}],
    "pair": [1, None],
    "named": {"b": 2},
    "flag": True,
}


def test_a_record_is_built_of_what_it_declares() -> None:
    made = record(_Outer, RIGHT, "f.json", "do this")
    assert made.share == 2.0 and type(made.share) is float and made.inner == [_Inner("a")]
    assert made.pair is not None and made.pair[0] == 1.0 and math.isnan(made.pair[1]) and made.named == {"b": 2}
    assert record(_Outer, {"count": 1, "share": 0.5, "inner": [], "pair": None}, "", "").pair is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 1.0}, "count: expected a whole number, got 1.0"),
        ({"count": True}, "count: expected a whole number, got True"),
        ({"count": 2**70}, "count: expected a whole number"),
        ({"share": "1"}, "share: expected a finite number, got '1'"),
        ({"share": math.inf}, "share: expected a finite number, got inf"),
        ({"share": 10**39 * 10**300}, "share: expected a finite number"),
        ({"inner": {}}, "inner: expected a list, got {}"),
        ({"inner": [{"name": 1}]}, "inner: 0: name: expected a text"),
        ({"inner": [1]}, "inner: 0: expected an object, got int"),
        ({"pair": [1.0]}, "pair: expected 2 items, got 1"),
        ({"named": {"b": "c"}}, "named: b: expected a whole number"),
        ({"named": []}, "named: expected an object"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
    ],
    ids=str,
)
def test_a_record_refuses_other_types_in_one_line(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as raised:
        record(_Outer, RIGHT | changes, "f.json", "do this")
    assert (
        str(raised.value).startswith("f.json: ")
        and said in str(raised.value)
        and str(raised.value).endswith("; do this")
    )


def test_a_record_names_a_missing_field() -> None:
    with pytest.raises(UserError, match=r"^f\.json: expected a field share, found none; do this$"):
        record(_Outer, {"count": 1, "inner": []}, "f.json", "do this")
    with pytest.raises(UserError, match=r"^f\.json: expected an object, got list; do this$"):
        record(_Outer, [], "f.json", "do this")


def test_models_are_called_by_as_little_as_tells_them_apart() -> None:
    one, two = (Evaluation(**{**asdict(EVALUATION), "model": f"{place}/half", "reference": "a/tiny"}) for place in "ab")
    assert labels([one]) == {"a/half": "half", "a/tiny": "tiny"}
    assert labels([one, two, BENCH]) == {"a/half": "a/half", "b/half": "b/half", "a/tiny": "tiny"}


def test_numbers_that_no_loss_has_are_drawn_within_bounds() -> None:
    rows = [
        MethodRow("m", 1, 8, "nll", 1.0, None, loss, None, 1.0, None, 1, 1) for loss in (5e-324, 1e308, -1e308, 0.0)
    ]
    section = losses.section(Contents(tables=[MethodTable("rows", rows)]))
    assert section is not None and as_script(section.charts)
    places = [row["drawn"] for row in section.charts["methods-0"]["data"]["values"]]
    assert all(charts.LEAST <= place <= charts.MOST for place in places)
    assert losses.section(Contents(tables=[MethodTable("rows", rows[2:])])) is not None
