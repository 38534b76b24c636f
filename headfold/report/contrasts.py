"""The reports of `headfold eval --compare` and `headfold eval --task`."""

from typing import Any

from .tables import show_table

HEADER = ["metric", "model", "value", "difference", "interval", "p", ""]


def show_contrast(found: Any) -> None:
    """Print a paired comparison, metric by metric: the first model, then the others with their difference to it."""
    numbers = dict.fromkeys(f"{row.num_units:,}" for row in found.rows)
    title = f"{' and '.join(numbers)} {found.rows[0].units} of {found.source}"
    show_table(HEADER, [_cells(row, at, found.rows) for at, row in enumerate(found.rows)], title=title)
    level = f"{100 * found.level:.0f} %"
    print(
        f"difference to {found.rows[0].model}, with its {level} interval by paired bootstrap over {found.resamples:,} resamples"
    )
    for note in found.notes:
        print(f"note: {note}")


def show_tasks(found: Any) -> None:
    """Print the scores of a model on tasks of the evaluation harness, with their intervals."""
    header = ["task", "metric", "shots", "items", found.model, "interval"]
    header += [] if found.reference is None else [found.reference]
    rows = []
    for row in found.tasks:
        start = [row.task, f"{row.metric} {_arrow(row)}", "" if row.num_fewshot is None else str(row.num_fewshot)]
        values = [_number(row.value), f"[{_number(row.low)}, {_number(row.high)}]"]
        beside = [] if row.reference is None else [_number(row.reference)]
        rows.append([*start, f"{row.num_items:,}", *values, *beside])
    show_table(header, rows)
    print(f"interval: {100 * found.level:.0f} %, by bootstrap over items with {found.resamples:,} resamples")


def _arrow(row: Any) -> str:
    return "↓" if row.lower_is_better else "↑"


def _cells(row: Any, at: int, rows: Any) -> list[str]:
    same_metric = at and rows[at - 1].metric == row.metric
    start = ["" if same_metric else f"{row.metric} {_arrow(row)}", row.model, _number(row.value)]
    if row.difference is None:
        return [*start, "", "", "", ""]
    difference, low, high = (f"{number:+.{_digits(row.value)}f}" for number in (row.difference, row.low, row.high))
    return [*start, difference, f"[{low}, {high}]", f"{row.p:.2g}", row.verdict]


def _number(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    """Return the number of decimals: four for losses and shares, two for percents and perplexities."""
    return 4 if abs(value) < 10 else 2
