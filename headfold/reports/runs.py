"""The report of `headfold run`: the folds of a recipe in one table."""

from typing import Any

from .tables import count_range, duration, show_table, size


def show_run(found: Any) -> None:
    """Print the folds of a recipe: their K/V heads, cache and time, and how each was measured beside the model."""
    measured = [row for row in found.rows if row.metric]
    header = ["fold", "K/V heads", "K/V per token", "time"]
    header += [measured[0].metric, "original", "KL"] if measured else []
    rows = []
    for row in found.rows:
        made = row.fold
        rows.append([
            row.name or found.out.name, count_range(made.num_kv_heads_least, made.num_kv_heads_after), size(made.kv_bytes_after),
            duration(made.seconds), *([_number(row.value), _number(row.original), _number(row.kl)] if measured else []),
        ])  # fmt: skip
    show_table(header, rows)
    for row in found.rows:
        for note in row.fold.notes:
            print(f"note: {row.name}{row.name and ': '}{note}")
    print(f"wrote {found.out}" + (f" and {found.report}" if found.report else ""))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
