"""The report of `headfold bench`: a table, the attention path that ran, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plot import COLOURS, new_axes, save
from .tables import percent, show_table, size

PARTS = ("weights", "attention", "cache", "rest")
"""The order of the columns that split the time of a token."""


def show_bench(found: Any) -> None:
    """Print the timings of a bench run."""
    rows = found.rows
    varied = [name for name in ("context", "batch") if len({getattr(row, name) for row in rows}) > 1]
    parts = [part for part in PARTS if any(part in (row.parts or ()) for row in rows)]
    header = ["model", "attention", "K/V heads", *varied]
    header += [*([] if found.skip_prefill else ["first token"]), "new token", "tokens/s"]
    header += [*([] if found.skip_prefill else ["sample"]), "K/V cache", "peak", "read", *parts]
    show_table(header, [_cells(row, found, varied, parts) for row in rows])
    same = [f"{name} {getattr(rows[0], name)}" for name in ("context", "batch") if name not in varied]
    padded = ", half of the samples padded" if found.padded else ""
    print(
        f"{found.new_tokens} new tokens, {', '.join([*same, found.dtype])}{padded}; medians over {found.rounds} interleaved rounds; "
        "new token: time for the whole batch; peak: memory beyond the weights"
    )
    print(
        f"{found.device}, {found.threads} threads: reads memory at {found.read_bandwidth / 1e9:.1f} GB/s; "
        "read: weights and cache of one token, per second"
    )
    for line in (*found.paths, *(f"note: {note}" for note in found.notes)):
        print(line)


def _cells(row: Any, found: Any, varied: Sequence[str], parts: Sequence[str]) -> list[str]:
    whole = [] if found.skip_prefill else [_time(row.first_token)]
    sample = [] if found.skip_prefill else [_time(row.per_sample)]
    share = percent(row.bytes_per_second / found.read_bandwidth)
    return [
        row.model,
        row.attention,
        " and ".join(map(str, row.num_kv_heads)),
        *(f"{getattr(row, name):,}" for name in varied),
        *whole,
        _time(row.per_token),
        f"{row.tokens_per_second:.3g}",
        *sample,
        size(row.kv_bytes),
        "" if row.peak_bytes is None else size(row.peak_bytes),
        f"{row.bytes_per_second / 1e9:.3g} GB/s ({share})",
        *(_time(row.parts[part]) if part in row.parts else "" for part in parts),
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def plot_bench(path: Path, found: Any) -> None:
    """Write a picture of time against K/V heads where these differ, else against the context or the batch.

    The time is that of a whole sample (figure 6 of 2305.13245), or of a new token where the prompt was skipped.
    """
    from matplotlib.ticker import NullLocator

    attribute, unit = ("per_token", "new token") if found.skip_prefill else ("per_sample", "sample")
    places = {"num_kv_heads": "K/V heads", "context": "tokens of context", "batch": "samples at once"}
    along = next((name for name in places if len({getattr(row, name) for row in found.rows}) > 1), "context")
    axes = new_axes()
    ticks = sorted({_place(row, along) for row in found.rows})
    for number, (label, points) in enumerate(_curves(found.rows, along, attribute).items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.8, color=colour)
        axes.annotate(label, points[-1], (8, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
    names = {_place(row, along): row.model for row in found.rows} if _one_each(found.rows, along) else {}
    axes.set_xticks(ticks, [f"{tick:,}\n{names[tick]}" if names else f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15 * (ticks[-1] / ticks[0]) ** 0.35)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(places[along])
    axes.set_ylabel(f"seconds per {unit}")
    axes.set_title(f"{found.new_tokens} new tokens, {found.dtype}, {found.device}", loc="left", fontsize=11)
    save(axes, path)


def _place(row: Any, along: str) -> int:
    found = getattr(row, along)
    return max(found) if along == "num_kv_heads" else found


def _one_each(rows: Sequence[Any], along: str) -> bool:
    """Return whether every model has a number of K/V heads of its own."""
    models = {(row.model, row.num_kv_heads) for row in rows}
    return along == "num_kv_heads" and len({m for m, _ in models}) == len({h for _, h in models}) == len(models) > 1


def _curves(rows: Sequence[Any], along: str, attribute: str) -> dict[str, list[tuple[int, float]]]:
    """Return label → points from left to right. A label names only what differs between curves."""
    others = [name for name in ("model", "attention", "num_kv_heads", "context", "batch") if name != along]
    varied = [name for name in others if len({str(getattr(row, name)) for row in rows}) > 1]
    joined = _one_each(rows, along)
    varied = [name for name in varied if name != "model" or not joined]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        words = {"model": row.model, "attention": row.attention, "num_kv_heads": f"{max(row.num_kv_heads)} K/V heads"}
        words |= {"context": f"{row.context:,} tokens", "batch": f"batch {row.batch}"}
        label = ", ".join(words[name] for name in varied) or (row.attention if joined else row.model)
        curves.setdefault(label, []).append((_place(row, along), getattr(row, attribute)))
    return {label: sorted(points) for label, points in curves.items()}
