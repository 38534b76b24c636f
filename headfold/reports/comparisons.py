"""The reports of `headfold frontier` and `headfold compare`."""

from pathlib import Path
from typing import Any

from .plot import COLOURS, new_axes, save
from .tables import duration, flops, show_table, size


def show_frontier(found: Any) -> None:
    """Print the points of a frontier: their bytes, counts, and predicted and measured losses."""
    rows = [
        [
            size(point.kv_bytes_per_token),
            ",".join(map(str, point.num_kv_heads.values()))
            + (f" × {point.head_dim_multiple}" if point.head_dim_multiple > 1 else ""),
            size(point.weight_bytes),
            f"{point.predicted:.3g}",
            "" if point.measured is None else f"{point.measured:.3g}",
            point.plan,
        ]
        for point in found.points
    ]
    show_table(["K/V per token", "K/V heads", "weights", "predicted", "measured", "plan"], rows)
    if any(point.head_dim_multiple > 1 for point in found.points):
        print("× N: N times fewer heads with N times the head_dim, in the same cache; weights: those of attention")
    agree = [
        ("predicted errors of single sites and their measured losses", found.site_rank_correlation),
        ("predicted and measured losses of the points", found.rank_correlation),
    ]
    for what, correlation in agree:
        if correlation is not None:
            print(f"rank correlation of {what}: {correlation:.2f}")
    print(f"wrote {found.directory}: headfold fold MODEL OUT --plan {found.directory}/plan-….json makes a point")
    print(found.page)


def show_comparison(found: Any) -> None:
    """Print a comparison of methods, count by count, with the best method of each count marked."""
    rows = []
    for count in dict.fromkeys(row.num_kv_heads for row in found.rows):
        same = [row for row in found.rows if row.num_kv_heads == count]
        best = min(same, key=lambda row: row.loss_increase)
        rows += [
            [
                row.method + (" *" if row is best else ""),
                str(count),
                size(row.kv_bytes_per_token),
                f"{row.value:.4f}",
                f"{row.loss_increase:.4f}",
                "" if row.kl is None else f"{row.kl:.3g}",
                duration(row.seconds),
                "" if row.peak_bytes is None else size(row.peak_bytes),
                size(row.weight_bytes),
                flops(row.flops_per_token),
            ]
            for row in same
        ]
    if not found.rows:
        print("nothing was compared")
    else:
        first = found.rows[0]
        header = [
            "method",
            "K/V heads",
            "K/V per token",
            first.metric,
            "loss increase" if first.metric == "nll" else "decrease",
            "KL",
            "fold",
            "memory",
            "weights",
            "FLOPs",
        ]
        show_table(header, rows, title=f"{found.model} on {found.data}")
        original = "" if first.original is None else f", which has {first.original:.4f}"
        print(
            f"difference to the original{original}; *: the best at that count; rows in {found.directory}/compare.json"
        )
        print("weights and FLOPs are those of attention; FLOPs per token of a prompt of 2,048 tokens")
    print(found.page)
    for what, reason in found.skipped.items():
        print(f"skipped: {what}: {reason}")


def plot_comparison(path: Path, found: Any) -> None:
    """Write a picture of the quality lost against the K/V cache. Where there are more methods than colours, the worst are left out."""
    from matplotlib.ticker import NullFormatter

    curves: dict[str, list[tuple[int, float]]] = {}
    for row in found.rows:
        curves.setdefault(row.method, []).append((row.kv_bytes_per_token, max(row.loss_increase, 1e-5)))
    shown = sorted(curves, key=lambda name: sum(increase for _, increase in curves[name]) / len(curves[name]))[
        : len(COLOURS)
    ]
    axes = new_axes()
    axes.set_yscale("log")
    for colour, name in zip(COLOURS, shown, strict=False):
        line = sorted(curves[name])
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=1.8, color=colour, label=name)
    ticks = sorted({row.kv_bytes_per_token for row in found.rows})
    axes.set_xticks(ticks, [size(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("K/V cache per token")
    axes.set_ylabel("loss increase (nats)" if found.rows[0].metric == "nll" else f"decrease of {found.rows[0].metric}")
    axes.legend(frameon=False, fontsize=9)
    save(axes, path)
