"""Files of sensitivities are used again for what they were measured on, and for nothing else."""

# ruff: noqa: F811 - fixtures are arguments

from pathlib import Path

import pytest
from test_budget import stats  # noqa: F401 - a fixture
from test_cli import model  # noqa: F401 - a fixture

import headfold
from headfold.budget import curves
from headfold.budget.sensitivity_file import read_sensitivities, write_sensitivities
from headfold.core.errors import UserError

MEASURED = {"layers.0.self": {1: 0.5, 2: 0.25}}


def test_what_was_written_is_read_and_the_rest_refused(tmp_path: Path) -> None:
    path, about = tmp_path / "s.json", {"source": "a", "dtype": None}
    assert read_sensitivities(path, about) == {}
    write_sensitivities(path, about, MEASURED)
    assert read_sensitivities(path, about) == MEASURED
    for other in ({"source": "b"}, {"dtype": "float64"}):
        with pytest.raises(UserError, match="got others"):
            read_sensitivities(path, about | other)


def test_a_file_without_a_dtype_is_one_of_the_default(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    path = tmp_path / "s.json"
    write_sensitivities(path, {"source": "a"}, MEASURED)
    assert read_sensitivities(path, {"source": "a", "dtype": None}) == MEASURED
    with pytest.raises(UserError, match="got others"):
        read_sensitivities(path, {"source": "a", "dtype": "float64"})


@pytest.mark.parametrize(("first", "second"), [(None, "float64"), ("float64", None)])
def test_measurements_of_another_dtype_are_not_used(
    first: str | None,
    second: str | None,
    model: Path,
    stats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plan(dtype: str | None) -> None:
        headfold.plan(
            model, tmp_path / "plan.json", kv_budget="50%", allowed=[4], refit=False, stats=stats, dtype=dtype,
            sensitivity=tmp_path / "s.json", force=True,
        )  # fmt: skip

    plan(first)
    monkeypatch.setattr(curves, "_measure", lambda *_: pytest.fail("measured again"))
    plan(first)
    with pytest.raises(UserError, match="expected sensitivities of this model, data and method, got others"):
        plan(second)
