"""Bytes and speed before and after: serving costs, weights on disk, and what bench and check measured."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..reports.tables import percent, serving_cost_rows, size
from ..timing.cases import BenchResult
from . import charts
from .contents import Contents, Fold
from .elements import Section, chart, not_measured, paragraph, subheading, table
from .results import EngineCheck, labels
from .summary import kv_heads

MOST_PIXELS = 3000
"""Height of a chart."""


def section(contents: Contents) -> Section | None:
    """Return the section; None where there is neither a fold nor a measurement of speed."""
    benches = [found for found in contents.results if isinstance(found, BenchResult)]
    checks = [found for found in contents.results if isinstance(found, EngineCheck)]
    parts = [_costs(fold, contents) for fold in contents.folds]
    drawn: dict[str, Any] = {}
    for number, found in enumerate(benches):
        parts += _bench(found, number)
        drawn[f"speed-{number}"] = _speed(found)
    for check in checks:
        parts += _check(check, labels(contents.results)[check.model])
    writers = [fold for fold in contents.folds if fold.kind == "text"]
    if writers and not benches:
        originals = dict.fromkeys(contents.original_of(fold) for fold in writers)
        named = " ".join([*originals, *(fold.word for fold in writers)])
        parts.append(
            not_measured("Speed was not measured; this measures it:", f"headfold bench {named} --json > bench.json")
        )
    return Section("Bytes and speed", parts, drawn) if parts else None


def _costs(fold: Fold, contents: Contents) -> Markup:
    rows: list[Sequence[str]] = [("K/V heads per site", *kv_heads(fold))]
    original = contents.original
    if original is not None:
        rows += serving_cost_rows(*original.costs[fold.name])
    elif table_of_card := [row for row in fold.card.table if len(row) == 3 and row[0] != "K/V heads"]:
        rows += table_of_card
    elif fold.kv_bytes_per_token is not None:
        rows.append(("K/V cache per token", "not recorded: give --original DIR", size(fold.kv_bytes_per_token)))
    before = "not at hand: give --original DIR" if original is None else size(original.weight_bytes)
    rows.append(("all weights, on disk", before, size(fold.weight_bytes)))
    return table(f"Cost of serving {fold.name}", ("", "original", "this fold"), rows)


def _bench(found: BenchResult, number: int) -> list[Markup]:
    rows = [
        (
            f"{row.model}, {row.attention}",
            " and ".join(map(str, row.num_kv_heads)),
            f"{row.context:,}",
            str(row.batch),
            f"{row.tokens_per_second:.3g}",
            f"{row.per_token * 1e3:.3g} ms",
            "" if found.skip_prefill else f"{row.first_token * 1e3:.3g} ms",
            size(row.kv_bytes),
            "" if row.peak_bytes is None else size(row.peak_bytes),
            percent(row.bytes_per_second / found.read_bandwidth) if found.read_bandwidth else "",
        )
        for row in found.rows
    ]
    header = (
        "model, attention", "K/V heads", "context", "batch", "tokens/s", "new token", "first token", "K/V cache", "peak",
        "of bandwidth",
    )  # fmt: skip
    threads = "thread" if found.threads == 1 else "threads"
    where = f"{found.device}, {found.threads} {threads}, {found.dtype}; medians over {found.rounds} rounds of {found.new_tokens} new tokens"
    return [
        chart(f"speed-{number}", "New tokens per second", table("Decoding", header, rows)),
        paragraph(where, "note"),
        *(paragraph(note, "note") for note in found.notes),
    ]


def _speed(found: BenchResult) -> dict[str, Any]:
    settings = {(row.context, row.batch) for row in found.rows}
    rows = [
        {
            "model": f"{row.model}, {row.attention}",
            "setting": f"{row.context:,} tokens, batch {row.batch}",
            "tokens": row.tokens_per_second,
            "cache": size(row.kv_bytes),
        }
        for row in found.rows
    ]
    names = list(dict.fromkeys(str(row["model"]) for row in rows))
    encoding: dict[str, Any] = {
        "y": {"field": "model", "type": "nominal", "sort": names, "title": None, "axis": {"labelLimit": 150}},
        "x": {"field": "tokens", "type": "quantitative", "title": "new tokens per second"},
        "color": charts.colour("setting", "setting", list(dict.fromkeys(str(row["setting"]) for row in rows))),
        "tooltip": charts.tooltip(
            ("model", "model", ""), ("setting", "setting", ""), ("tokens", "tokens/s", ".3~r"),
            ("cache", "K/V cache", ""),
        ),
    }  # fmt: skip
    if len(settings) > 1:
        encoding["yOffset"] = {"field": "setting", "type": "nominal"}
    height = min(30 + 26 * len(names) * len(settings), MOST_PIXELS)
    bar = {"type": "bar", "cornerRadiusEnd": 3}
    return charts.spec("New tokens per second of each model", rows, height=height, mark=bar, encoding=encoding)


def _check(found: EngineCheck, called: str) -> list[Markup]:
    run = [row for row in found.rows if row.version is not None]
    if not run:
        return []
    rows = [
        (
            f"{row.engine} {row.version}",
            row.refused or ("the same" if row.same else "something else"),
            "" if row.kl is None else f"{row.kl:.1e}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:.3g}",
            "" if row.kv_bytes_per_token is None else size(row.kv_bytes_per_token),
        )
        for row in run
    ]
    header = ("engine", "computes", "KL to headfold's runtime, nats", "tokens/s", "K/V per token")
    return [subheading(f"{called} in engines"), table("Run in engines, in float32", header, rows)]
