"""Loss by position in the context, as `headfold eval` measures it of language models."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ..evaluate.perplexity import Evaluation
from . import charts
from .contents import Contents
from .elements import Section, chart, not_measured, table
from .results import labels


def section(contents: Contents) -> Section | None:
    """Return the section; None where no language model was given."""
    found = [one for one in contents.results if isinstance(one, Evaluation)]
    if found:
        curves = _curves(found, labels(contents.results))
        header = ("tokens", *curves)
        ends = sorted({end for curve in curves.values() for end in curve})
        rows = [
            (f"to {end:,}", *(f"{curve[end]:.4f}" if end in curve else "" for curve in curves.values())) for end in ends
        ]
        numbers = table("Mean loss in nats per token, by position in the window", header, rows)
        return Section(
            "By position",
            [chart("positions", "Loss by position in the context", numbers)],
            {"positions": _chart(curves)},
        )
    models = [fold for fold in contents.folds if fold.kind == "text"]
    if not models:
        return None
    first = models[0]
    command = f"headfold eval {first.word} --reference {contents.original_of(first)} --json > eval.json"
    lines: list[Markup] = [not_measured("The loss by position was not measured; this measures it:", command)]
    return Section("By position", lines, {})


def _curves(found: list[Evaluation], called: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """Return by model, and by text where there are several, the loss of each bin, by the position at which the bin ends."""
    curves: dict[str, dict[int, float]] = {}
    several = len({one.text for one in found}) > 1
    for one in found:
        for name, losses in ((one.reference, one.reference_nll_by_position), (one.model, one.nll_by_position)):
            if name is not None and losses:
                width = (one.context - 1) / len(losses)
                ends = [round(width * (number + 1)) for number in range(len(losses))]
                label = called[name] + (f" on {one.text}" if several else "")
                curves[label] = {end: loss for end, loss in zip(ends, losses, strict=True) if loss == loss}
    return curves


def _chart(curves: dict[str, dict[int, float]]) -> dict[str, Any]:
    rows = [{"model": name, "end": end, "loss": loss} for name, curve in curves.items() for end, loss in curve.items()]
    return charts.spec(
        "Mean loss of the tokens up to each position of the window",
        rows,
        params=[charts.picked("model")],
        mark={"type": "line", "point": {"size": 30}, "strokeWidth": 2},
        encoding={
            "x": {"field": "end", "type": "quantitative", "title": "tokens of context", "axis": {"grid": False}},
            "y": {"field": "loss", "type": "quantitative", "title": "nats per token", "scale": {"zero": False}},
            "color": charts.colour("model", "model", list(curves)),
            "opacity": charts.PICKED_OPACITY,
            "tooltip": charts.tooltip(("model", "model", ""), ("end", "tokens", ",d"), ("loss", "nats per token", ".4f")),
        },
    )  # fmt: skip
