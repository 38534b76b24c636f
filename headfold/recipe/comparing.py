"""Every method at every count of K/V heads on the user's model and data: one table, and a row is never computed twice."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.staging import write_json
from ..checkpoint.stats_file import StatsFile
from ..core.errors import UserError, suggest
from ..corpus.samples import kind_of
from ..evaluate import classification, embedding, perplexity
from ..planning import parse_group, parse_kv_heads
from ..timing.machine import peak_memory
from .folding import fold
from .measuring import calibrate, default_device
from .scoring import Scores, check_text, evaluate
from .source import Progress, Source, open_source, open_stats, silent

REFIT = "+refit"
METHODS: dict[str, dict[str, str]] = {
    "mean": {"merge": "mean", "group": "contiguous"},
    "first": {"merge": "first", "group": "contiguous"},
    "random": {"merge": "random", "group": "contiguous"},
    "procrustes": {"merge": "procrustes", "group": "swap:cost=procrustes"},
    "procrustes+norm": {"merge": "procrustes:norm=true", "group": "swap:cost=procrustes"},
    "qcqa-ec": {"merge": "mean", "group": "qcqa"},
    "qcqa-ac": {"merge": "mean", "group": "qcqa:unequal=true"},
    "asymgqa": {"merge": "mean", "group": "asymgqa"},
    "asymgqa-unequal": {"merge": "mean", "group": "asymgqa:unequal=true"},
    "absorb": {"merge": "absorb", "group": "swap"},
    "absorb-unequal": {"merge": "absorb", "group": "swap:unequal=true"},
    "absorb-wide": {"merge": "absorb", "group": "swap", "head_dim_multiple": "2"},
}
"""The published methods and ours (`absorb+refit` is the default of fold); each may have `+refit` behind its name. Of `absorb-wide` half as
many heads, twice as wide, share the cache of that count: the same bytes, at the price that its row names."""
WITHOUT_REFIT = ("random",)
"""Whose heads are to be trained: there is nothing to refit to."""
DEFAULT = tuple(name + end for name in METHODS for end in ("", REFIT) if not (end and name in WITHOUT_REFIT))


STATISTICS = "stats.safetensors"
FOLDED = ".headfold-folded"
"""Where a row's fold lies while it is measured: a name that no user's directory has."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one count. `rise` is how much worse than the original the metric is, whichever way it counts."""

    method: str
    kv_heads: int
    """Whose cache it takes, in heads of the source's width."""
    kv_bytes_per_token: int
    metric: str
    value: float
    original: float | None
    rise: float
    kl: float | None
    """To the original, in nats per token or item; None where the metric has none."""
    seconds: float
    """Of the fold: plan, merge, refit and writing, without calibration."""
    peak_bytes: int | None
    """Memory that the fold took, at most."""
    weight_bytes: int
    """Of attention, and beside it its arithmetic in a prompt: `recipe.price.ServingCost`."""
    flops_per_token: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, and where they lie."""

    model: str
    data: str
    directory: str
    rows: list[Row]
    skipped: dict[str, str]
    """Method and count → why it could not be folded."""

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


def compare(
    model: str | Path,
    kv_heads: Sequence[str | int],
    *,
    methods: Sequence[str] = DEFAULT,
    out: str | Path | None = None,
    text: str | None = None,
    limit: int | None = None,
    calibration: str | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    stats: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Fold `model` by each of `methods` to each of `kv_heads`, and measure what that loses (`recipe.evaluate` on `text`).

    Statistics are measured once, for all methods, or taken from `stats`. Rows are kept in the directory `out` (default: the model's
    name with
    `.compare`), and another call with the same settings goes on from there; with others it is refused unless `force`.

    Raises:
        UserError: an unknown method, a count that no site can have, options that contradict each other, data that does not suit the
            model, or no method that could be folded.
    """
    for name in methods:
        if name.removesuffix(REFIT) not in METHODS or name in {one + REFIT for one in WITHOUT_REFIT}:
            raise UserError(f"compare: no method {name!r}; {suggest(name, list(DEFAULT))}")
    source, progress = open_source(model), progress or silent
    open_stats(stats, source)
    measures = {"calibration": calibration, "tokens": tokens, "items": items}
    if stats is not None and (named := [f"--{name}" for name, value in measures.items() if value is not None]):
        raise UserError(
            f"compare: --stats and {' and '.join(named)} exclude each other: statistics say what they are of; give one"
        )
    check_text(text, kind_of(source.checkpoint.config), model)
    wanted = [(name, count) for count in _counts(source, kv_heads, methods) for name in methods]
    directory = Path(out or f"{source.checkpoint.path.resolve().name}.compare")
    settings = {
        "version": version("headfold"), "model": source.checkpoint.fingerprint(), "text": text, "limit": limit, "calibration": calibration,
        "tokens": tokens, "items": items, "columns": list(columns), "context": context, "seed": seed,
        "stats": stats and StatsFile(Path(stats)).metadata, "files": [_digest(name) for name in (text, calibration)],
    }  # fmt: skip
    known = _known(directory, settings, force)
    directory.mkdir(parents=True, exist_ok=True)
    # Before anything else lies there: it says whose directory this is, and of what.
    write_json(directory / "compare.json", {"settings": settings, "rows": [asdict(row) for row in known]})
    measured = Path(stats) if stats is not None else directory / STATISTICS
    if not measured.exists():
        calibrate(
            model, measured, calibration=calibration, tokens=tokens, items=items, columns=columns, seed=seed, device=device,
            progress=progress,
        )  # fmt: skip
    rows, skipped = {(row.method, row.kv_heads): row for row in known}, {}
    for number, (name, count) in enumerate(wanted):
        progress("compare", number, len(wanted))
        if (name, count) in rows:
            continue
        found = _row(source, name, count, directory, measured, text, limit, columns, context, seed, device)
        if isinstance(found, str):
            skipped[f"{name} at {count}"] = found
            continue
        rows[name, count] = found
        write_json(directory / "compare.json", {"settings": settings, "rows": [asdict(row) for row in rows.values()]})
    progress("compare", len(wanted), len(wanted))
    if skipped and not rows:
        raise UserError(f"compare: no method could be folded; {next(iter(skipped))}: {next(iter(skipped.values()))}")
    order = {pair: place for place, pair in enumerate(wanted)}
    chosen = sorted((pair for pair in rows if pair in order), key=order.__getitem__)
    said = text or "the bundled text"
    return Comparison(str(model), said, str(directory), [rows[pair] for pair in chosen], skipped)


def _counts(source: Source, kv_heads: Sequence[str | int], methods: Sequence[str]) -> list[int]:
    """Counts that all of the methods can have."""
    unequal = all(parse_group(METHODS[name.removesuffix(REFIT)]["group"]).unequal for name in methods)
    return [
        parse_kv_heads(asked, max(site.num_kv_heads for site in source.sites), unequal=unequal) for asked in kv_heads
    ]


def _digest(name: str | None) -> str | None:
    """Of a file's contents, so that rows of other data are not taken for rows of these; None of what is no single file."""
    path = Path(name.partition(":")[0]) if name else None
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known(directory: Path, settings: Mapping[str, Any], force: bool) -> list[Row]:
    """Rows of an earlier call with the same settings."""
    file = directory / "compare.json"
    if not file.exists():
        if directory.exists() and any(directory.iterdir()) and not force:
            raise UserError(
                f"{directory}: expected an earlier comparison or nothing, got other files; choose another --out"
            )
        (directory / STATISTICS).unlink(missing_ok=True)  # of who knows what
        return []
    try:
        found = json.loads(file.read_text())
        same = found["settings"] == json.loads(json.dumps(settings, default=str))
        rows = [Row(**row) for row in found["rows"]]
        numbers = [number for row in rows for number in (row.kv_heads, row.value, row.rise, row.seconds)]
        if not all(isinstance(number, float | int) for number in numbers):
            raise TypeError("a row without its numbers")
    except (ValueError, KeyError, TypeError) as error:
        if not force:
            raise UserError(
                f"{file}: expected rows of this version of headfold; choose another --out, or --force to begin anew"
            ) from error
        same, rows = False, []
    if same:
        return rows
    if not force:
        raise UserError(
            f"{file}: made with other data or another model; choose another --out, or --force to begin anew"
        )
    (directory / STATISTICS).unlink(missing_ok=True)
    return []


def _row(
    source: Source,
    name: str,
    count: int,
    directory: Path,
    stats: Path,
    text: str | None,
    limit: int | None,
    columns: Sequence[str],
    context: int | None,
    seed: int,
    device: str | None,
) -> Row | str:
    """The row, or why the method cannot have this count."""
    made = directory / FOLDED
    for left in (made, made.with_name(f"{FOLDED}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    largest = max(site.num_kv_heads for site in source.sites)
    started = time.monotonic()
    try:
        with peak_memory(device or default_device()) as peak:
            result = fold(
                source.name, made, kv_heads=f"{count}/{largest}", refit=name.endswith(REFIT), stats=stats, seed=seed, verify=False,
                device=device, **METHODS[name.removesuffix(REFIT)],
            )  # fmt: skip
    except UserError as error:
        return str(error)
    seconds = time.monotonic() - started
    try:
        options = {} if context is None else {"context": context}
        found = evaluate(
            made, reference=source.name, text=text, limit=limit, columns=columns, device=device, max_new_tokens=0, **options
        )  # fmt: skip
    finally:
        shutil.rmtree(made, ignore_errors=True)
    metric, value, original, rise, kl = scored(found)
    return Row(
        name, count, result.kv_bytes_after, metric, value, original, rise, kl, round(seconds, 2), peak.num_bytes,
        result.after.weight_bytes, result.after.flops_per_token,
    )  # fmt: skip


def scored(found: perplexity.Evaluation | Scores) -> tuple[str, float, float | None, float, float | None]:
    """Metric, value, the original's value, how much worse that is, and the KL to the original."""
    measured = found.measured if isinstance(found, Scores) else found
    if isinstance(measured, classification.Classification):
        value, original = measured.accuracy, measured.reference_accuracy
        return "accuracy", value, original, original - value, measured.kl
    if isinstance(measured, embedding.Embedding):
        return "cosine", measured.cosine, None, 1 - measured.cosine, None
    return "nll", measured.nll, measured.reference_nll, measured.nll - measured.reference_nll, measured.kl
