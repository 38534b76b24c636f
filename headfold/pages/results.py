"""What eval, bench and check print with --json, read back from a file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..core.errors import UserError
from ..core.json_input import read_value
from ..core.records import MOST_ITEMS, record
from ..evaluate.harness import TaskEvaluation
from ..evaluate.paired import PairedRow
from ..evaluate.perplexity import Evaluation
from ..timing.cases import BenchResult

ADVICE = "name a file with what headfold eval, bench or check printed with --json"


@dataclass(frozen=True, slots=True)
class Paired:
    """A paired comparison: what each row of its list repeats, and the rows."""

    source: str
    level: float
    rows: Sequence[PairedRow]


@dataclass(frozen=True, slots=True)
class DataResult:
    """The measures of a model that is no causal language model, by the name of the field: its own value and the reference's."""

    kind: str
    model: str
    reference: str | None
    source: str
    num_items: int
    measures: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine of a check. Without a run all but the first three are None."""

    engine: str
    install: str
    serve: str
    version: str | None = None
    refused: str | None = None
    tokens_per_second: float | None = None
    kv_bytes_per_token: float | None = None
    kl: float | None = None
    same: bool | None = None


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """A check of serving engines."""

    model: str
    rows: Sequence[EngineRow]


Result = Evaluation | DataResult | TaskEvaluation | Paired | BenchResult | EngineCheck


@dataclass(frozen=True, slots=True)
class _Shared:
    source: str
    level: float


@dataclass(frozen=True, slots=True)
class _Data:
    kind: str
    model: str
    reference: str | None
    source: str
    num_items: int


@dataclass(frozen=True, slots=True)
class _Engines:
    model: str
    rows: list[EngineRow]


def read_result(path: Path) -> Result:
    """Return the result in a file, of whichever verb printed it.

    Raises:
        UserError: it is not JSON, none of these results, or a field of it has another type.
    """
    found, where = read_value(path, ADVICE), str(path)
    if isinstance(found, list) and 0 < len(found) <= MOST_ITEMS and _has(found[0], "metric", "verdict"):
        shared = record(_Shared, found[0], where, ADVICE)
        return Paired(shared.source, shared.level, [record(PairedRow, row, where, ADVICE) for row in found])
    if _has(found, "nll_by_position", "num_windows"):
        return record(Evaluation, found, where, ADVICE)
    if _has(found, "tasks"):
        return record(TaskEvaluation, found, where, ADVICE)
    if _has(found, "rows", "read_bandwidth"):
        return record(BenchResult, found, where, ADVICE)
    if _has(found, "rows", "right"):
        engines = record(_Engines, found, where, ADVICE)
        return EngineCheck(engines.model, engines.rows)
    if _has(found, "kind", "num_items"):
        facts = record(_Data, found, where, ADVICE)
        return DataResult(facts.kind, facts.model, facts.reference, facts.source, facts.num_items, _measures(found))
    raise UserError(f"{where}: expected a result of headfold, got other JSON; {ADVICE}")


def models_of(found: Result) -> list[str]:
    """Return the names of the models that a result is about, its reference among them; those of a benchmark are shortened already."""
    if isinstance(found, Paired):
        return [row.model for row in found.rows]
    if isinstance(found, BenchResult):
        return []
    reference = None if isinstance(found, EngineCheck) else found.reference
    return [name for name in (found.model, reference) if name is not None]


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Return what models are called on the page: the last part of their path, the whole path where two would be called the same."""
    names = {name for found in results for name in models_of(found)}
    times = Counter(PurePath(name).name for name in names)
    return {name: PurePath(name).name if times[PurePath(name).name] == 1 else name for name in names}


def _has(found: Any, *names: str) -> bool:
    return isinstance(found, dict) and all(name in found for name in names)


def _measures(found: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return every number that is no count, with the reference's beside it."""
    numbers = {name: value for name, value in found.items() if type(value) is float and abs(value) < 1e300}
    alone = (name for name in numbers if not name.startswith("reference_") and name != "seconds")
    return {name: (numbers[name], numbers.get(f"reference_{name}")) for name in alone}
