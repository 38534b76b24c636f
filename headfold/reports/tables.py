"""Numbers formatted for people, and tables: drawn by rich on a terminal, plain columns elsewhere."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO


def count_range(least: int, most: int) -> str:
    """Return a count, or a range where counts differ: `4`, `2 to 8`."""
    return str(most) if least == most else f"{least} to {most}"


def size(num_bytes: float) -> str:
    """Return bytes with a binary unit and three digits: `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 999.5 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def percent(share: float) -> str:
    """Return a share (0 to 1) as a percent with three digits and at most two decimals."""
    value = 100 * share
    return f"{value:.2f} %" if abs(value) < 10 else f"{value:.1f} %"


def duration(seconds: float) -> str:
    """Return seconds as `0.8 s`, `47 s` or `3 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def estimate(seconds: Mapping[str, float]) -> str:
    """Return seconds by stage as `about 40 s: calibrate 10, refit 30`, from 2 minutes on in minutes, from 2 hours in hours with a
    decimal; stages of less than a second are not named.
    """
    total = sum(seconds.values())
    unit, size, digits = ("s", 1, 0) if total < 120 else ("min", 60, 0) if total < 7200 else ("h", 3600, 1)
    stages = ", ".join(f"{name} {one / size:.{digits}f}" for name, one in seconds.items() if one >= 1)
    return f"about {total / size:.{digits}f} {unit}{': ' if stages else ''}{stages}"


def serving_cost_rows(before: Any, after: Any) -> list[list[str]]:
    """Return the rows of a table that compares two serving costs: head_dim, cache, weights and FLOPs."""
    both = (before, after)
    name = "K/V cache per token" if before.caches else "K and V per token, not cached"
    cache = [[name, *(size(one.kv_bytes_per_token) for one in both)]]
    cache += [cache_row(before.context, *(one.cache_bytes for one in both))] if before.caches else []
    return [
        ["head_dim of a K/V head", before.head_dims, after.head_dims],
        *cache,
        ["attention weights", size(before.weight_bytes), size(after.weight_bytes)],
        ["attention FLOPs per prompt token", *(flops(one.flops_per_token) for one in (before, after))],
    ]


def cache_row(context: int | None, *num_bytes: int) -> list[str]:
    """Return the row of a table with the size of a full cache, of at most 32,768 tokens; `context` is None where it has no limit."""
    if context is not None and context < 32_768:
        return [f"K/V cache at {context:,} tokens", *map(size, num_bytes)]
    return ["K/V cache at 32k tokens", *map(size, num_bytes)]


def flops(number: float) -> str:
    """Return floating-point operations with a decimal unit and three digits: `1.5 M`."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g} {unit}".rstrip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with its first column aligned to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of space-padded columns, the first aligned to the left and the others to the right."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = (
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def show_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", to: TextIO | None = None
) -> None:
    """Print a table, drawn by rich on a terminal and as plain columns elsewhere."""
    to = to or sys.stdout
    if not to.isatty():
        print(*filter(None, [title, plain_table(header, rows)]), sep="\n", file=to)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for at, name in enumerate(header):
        table.add_column(name, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(file=to).print(table)
