"""Vega-Lite specifications of the charts. Colours come from the stylesheet, so that they follow light and dark."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MOST_TICKS, MOST_ROWS = 8, 5000
LEAST, MOST = 1e-9, 1e9
"""Between which a loss is drawn."""
BYTES_OF_CACHE = "K/V cache per token"
_SIZES = (
    "datum.value < 1024 ? datum.value + ' B' : datum.value < 1048576 ? format(datum.value / 1024, '.3~r') + ' KiB' : \
format(datum.value / 1048576, '.3~r') + ' MiB'"
)
"""Bytes in binary units, as the tables have them."""


def spec(description: str, rows: Sequence[Row], *, height: int = 300, **parts: Any) -> dict[str, Any]:
    """Return a specification with its data, as wide as the page."""
    return {
        "description": description,
        "width": "container",
        "height": height,
        "data": {"values": list(rows[:MOST_ROWS])},
        **parts,
    }


def cache_axis(sizes: Iterable[int]) -> dict[str, Any]:
    """Return the logarithmic x axis of K/V bytes, with a tick at each of these sizes, or at as many of them as can be read."""
    every = sorted(set(sizes))
    step = -(-len(every) // MOST_TICKS)
    return {
        "field": "bytes",
        "type": "quantitative",
        "title": BYTES_OF_CACHE,
        "scale": {"type": "log", "base": 2, "nice": False, "padding": 20},
        "axis": {"labelExpr": _SIZES, "grid": False, "values": every[::step], "labelOverlap": True},
    }


def site_axis() -> dict[str, Any]:
    """Return the x axis of sites by their number."""
    title = "site, in the order of the forward pass"
    return {"field": "at", "type": "quantitative", "title": title, "axis": {"tickMinStep": 1, "grid": False}}


def loss_axis(title: str, drawn_at: Sequence[float]) -> dict[str, Any]:
    """Return the logarithmic y axis of losses that are drawn at these places."""
    low, high = math.floor(math.log10(min(drawn_at))), math.ceil(math.log10(max(drawn_at)))
    steps = (1, 2, 5) if high - low < 5 else (1,)
    ticks = [float(f"{step}e{power}") for power in range(low, high + 1) for step in steps]
    return {
        "field": "drawn",
        "type": "quantitative",
        "title": title,
        "scale": {"type": "log", "nice": False, "padding": 12},
        "axis": {"values": ticks, "format": "~g"},
    }


def drawn(losses: Sequence[float]) -> list[float]:
    """Return losses as a logarithmic axis can have them: those of zero and less at half of the least that is more, and all in bounds
    that a loss has.
    """
    positive = [loss for loss in losses if loss > 0]
    floor = max(min(positive) / 2, LEAST) if positive else LEAST
    return [min(max(loss, floor), MOST) for loss in losses]


def colour(field: str, title: str, order: Sequence[str]) -> dict[str, Any]:
    """Return the colour of a series, whose legend stands above the chart in rows."""
    return {
        "field": field,
        "type": "nominal",
        "title": title,
        "sort": list(order),
        "scale": {"domain": list(order)},
        "legend": {
            "orient": "top",
            "columns": {"signal": "max(1, floor(width / 170))"},
            "labelLimit": 150,
            "titleLimit": 400,
        },
    }


def picked(field: str) -> dict[str, Any]:
    """Return a selection by a click on the legend."""
    return {"name": "picked", "select": {"type": "point", "fields": [field]}, "bind": "legend"}


PICKED_OPACITY = {"condition": {"param": "picked", "value": 1}, "value": 0.12}


def tooltip(*fields: tuple[str, str, str]) -> list[dict[str, str]]:
    """Return what is shown of a mark under the pointer: field, title, and the number's format or an empty text."""
    return [
        {"field": field, "title": title, **({"format": form, "type": "quantitative"} if form else {"type": "nominal"})}
        for field, title, form in fields
    ]
