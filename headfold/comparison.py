"""Rows of a comparison of methods: one fold each, kept on disk so that the next call goes on from there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoint.ownership import has_contents
from .checkpoint.staging import write_json
from .core.errors import UserError
from .core.json_input import read_object
from .core.records import record
from .evaluate import classification, embedding
from .evaluate.data import DataEvaluation
from .evaluate.perplexity import Evaluation

STATISTICS = "stats.safetensors"


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method at one count of K/V heads."""

    method: str
    num_kv_heads: int
    """K/V heads of the source's head_dim that take as much cache as the fold."""
    kv_bytes_per_token: int
    metric: str
    value: float
    original: float | None
    loss_increase: float
    """Difference of the metric to the original's; positive if the fold is worse, whichever direction is better."""
    kl: float | None
    """KL to the original, in nats per token or item; None where the metric has none."""
    seconds: float
    """Seconds that the fold took: plan, merge, refit and writing, without calibration."""
    peak_bytes: int | None
    """Most memory that the fold took."""
    weight_bytes: int
    """Bytes of the attention weights; like `flops_per_token` as in `conversion.serving_cost.ServingCost`."""
    flops_per_token: int


@dataclass(frozen=True, slots=True)
class MethodComparison:
    """The rows of a comparison, and the directory that keeps them."""

    model: str
    data: str
    directory: str
    rows: list[MethodRow]
    skipped: dict[str, str]
    """Method and count → why it could not be folded."""
    page: str
    """A line on the page that was written beside the rows, or why there is none."""

    def to_json(self) -> list[dict[str, Any]]:
        """Return the machine-readable form, as --json prints it."""
        return [asdict(row) for row in self.rows]


def write_rows(directory: Path, settings: Mapping[str, Any], rows: Sequence[MethodRow]) -> None:
    """Write compare.json with the settings that its rows were measured with."""
    write_json(directory / "compare.json", {"settings": settings, "rows": [asdict(row) for row in rows]})


def earlier_rows(directory: Path, settings: Mapping[str, Any], force: bool) -> list[MethodRow]:
    """Return the rows of an earlier call with the same settings.

    Raises:
        UserError: other files, or rows of other settings, lie there and `force` is not given.
    """
    file = directory / "compare.json"
    if not file.exists():
        if has_contents(directory) and not force:
            raise UserError(
                f"{directory}: expected an earlier comparison or nothing, got other files; choose another --out"
            )
        (directory / STATISTICS).unlink(missing_ok=True)  # of unknown origin
        return []
    try:
        found = read_object(file)
        same = found["settings"] == json.loads(json.dumps(settings, default=str))
        rows = method_rows(found, file)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        if not force:
            raise UserError(
                f"{file}: expected rows of this version of headfold; choose another --out, or --force to start over"
            ) from error
        same, rows = False, []
    if same:
        return rows
    if not force:
        raise UserError(
            f"{file}: expected rows of the same data and model, got others; choose another --out, or --force to start over"
        )
    (directory / STATISTICS).unlink(missing_ok=True)
    return []


def method_rows(found: Mapping[str, Any], file: Path) -> list[MethodRow]:
    """Return the rows of a compare.json as they were written, losses that are not finite among them.

    Raises:
        UserError: a row has no such fields, or a field has another type.
    """
    rows = found.get("rows")
    advice = "name a folder that this version of headfold compare wrote"
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of rows, got {rows!r:.60}; {advice}")
    return [record(MethodRow, row, str(file), advice, finite=False) for row in rows]


def scored(found: Evaluation | DataEvaluation) -> tuple[str, float, float | None, float, float | None]:
    """Return the metric, its value, the original's value, how much worse that is, and the KL to the original."""
    measured = found.measured if isinstance(found, DataEvaluation) else found
    if isinstance(measured, classification.Classification):
        value, original = measured.accuracy, measured.reference_accuracy
        assert original is not None
        return "accuracy", value, original, original - value, measured.kl
    if isinstance(measured, embedding.Embedding):
        return "cosine", measured.cosine, None, 1 - measured.cosine, None
    assert measured.reference_nll is not None
    return "nll", measured.nll, measured.reference_nll, measured.nll - measured.reference_nll, measured.kl
