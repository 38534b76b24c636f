"""Pictures: perplexity against K/V bytes, training curves, and frontiers."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.disk import replacing
from ..core.errors import UserError
from .tables import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8a6d3b", "#6d597a")
"""Colours dark enough to be read on white; the first is for the method that the picture is about."""


def require_plot(path: Path, option: str = "--plot") -> None:
    """Check, before anything is measured, that the picture asked for with `option` can be written.

    Raises:
        UserError: matplotlib is not installed, or does not write files of this kind.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{option} needs matplotlib; pip install 'headfold[plot]', or leave {option} out")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{option} {path}: expected a file name ending in .png, .pdf or .svg; choose another")


def new_axes() -> "Axes":
    """Return the axes of an empty picture whose x axis is logarithmic, for sizes in bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    return axes


def save(axes: "Axes", path: Path) -> None:
    """Write the picture that these axes belong to."""
    from matplotlib.figure import Figure

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="major", color="0.92")
    figure = axes.figure
    assert isinstance(figure, Figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))


def draw_curve(path: Path, curve: Sequence[Mapping[str, float]], title: str) -> None:
    """Write a picture of a training run: the loss by step, and its parts where it has several, on a logarithmic axis."""
    axes = new_axes()
    axes.set_xscale("linear")
    axes.set_yscale("log")
    parts = {"loss": "loss", "kl": "KL(original ‖ model)", "site_error": "relative error of attention outputs"}
    shown = [name for name in parts if any(name in entry for entry in curve)]
    for name, colour in zip(shown, COLOURS, strict=False):
        points = [(entry["step"], entry[name]) for entry in curve if name in entry]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6 if name == "loss" else 1.0, label=parts[name])
    if len(shown) > 1:
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_title(title, loc="left", fontsize=10)
    save(axes, path)


def plot_perplexity(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    original: tuple[int, float],
    *,
    title: str,
) -> None:
    """Write a picture of perplexity against K/V bytes per token, both on logarithmic axes.

    `curves` maps a method to its (K/V bytes per token, perplexity) pairs; `original` is one such pair. Every curve begins at the
    original and is labelled at its other end.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes = new_axes()
    axes.set_yscale("log")
    axes.axhline(original[1], color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        line = sorted([original, *points], reverse=True)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=1.8, color=colour)
        axes.annotate(
            f"{name}  {line[-1][1]:.4g}",
            line[-1],
            (8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )
    sizes = sorted({original[0], *(point[0] for points in curves.values() for point in points)})
    axes.set_xticks(sizes, [size(num_bytes) for num_bytes in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=original[1] * 0.8)
    axes.set_xlim(original[0] * 1.15, sizes[0] / 1.9)
    right = axes.get_xlim()[1], original[1]
    axes.annotate(
        f"original  {original[1]:.4g}",
        right,
        (0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.35",
        fontsize=9,
    )
    axes.set_xlabel("K/V cache per token")
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title(title, loc="left", fontsize=11)
    save(axes, path)


def plot_frontier(path: Path, points: Sequence[Any], *, title: str) -> None:
    """Write a picture of a frontier: predicted losses as lines, measured losses as marks, with uniform counts in a colour of their
    own.
    """
    from matplotlib.ticker import NullFormatter

    axes = new_axes()
    for uniform, colour, name in (
        (False, COLOURS[0], "best counts per layer"),
        (True, COLOURS[1], "one count everywhere"),
    ):
        chosen = [point for point in points if point.uniform == uniform and point.predicted > 0]
        seen = [(point.kv_bytes_per_token, point.measured) for point in chosen if point.measured]
        line = [(point.kv_bytes_per_token, point.predicted) for point in chosen]
        if line:
            axes.plot(
                *zip(*line, strict=True),
                color=colour,
                linewidth=1.6,
                linestyle="--" if uniform else "-",
                label=f"{name}, predicted",
            )
        if seen:
            axes.plot(*zip(*seen, strict=True), "o", color=colour, markersize=5, label=f"{name}, measured")
    ticks = sorted({point.kv_bytes_per_token for point in points if point.uniform})
    if ticks:
        axes.set_xticks(ticks, [size(num_bytes) for num_bytes in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("log")
    axes.set_xlabel("K/V cache per token")
    axes.set_ylabel("loss increase (KL to the original, nats)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    save(axes, path)
