"""Loss by layer: the predicted error of each site of a fold, and the measured loss of each site folded alone."""

from typing import Any

from markupsafe import Markup

from ..core.plan import SitePlan
from ..reports.tables import percent
from . import charts
from .contents import Contents, Fold, Front
from .elements import Section, chart, not_measured, paragraph, table

TENSORS = (("key", "K"), ("value", "V"))


def section(contents: Contents) -> Section | None:
    """Return the section; None where there is neither a fold nor a frontier."""
    parts: list[Markup] = []
    drawn: dict[str, Any] = {}
    predicted = [fold for fold in contents.folds if any(_shares(site) for site in fold.plan.sites.values())]
    if predicted:
        drawn["errors"] = _errors_chart(predicted)
        tables = [table(fold.name, ("site", "K", "V"), _error_rows(fold)) for fold in predicted]
        parts += [
            chart("errors", "Predicted error of each layer", Markup("\n").join(tables)),
            paragraph(
                "The error of sharing K/V heads in these groups on the calibration data, before merge and refit: squared error of the "
                "attention logits (K) and of the block's output (V), as shares of their energy. Errors of different layers do not add up "
                "to a loss.",
                "note",
            ),
        ]
    for fold in contents.folds:
        if fold not in predicted:
            parts.append(
                not_measured(
                    f"No error was predicted for {fold.name}; statistics do:", "headfold fold MODEL OUT --stats STATS"
                )
            )
    for number, front in enumerate(contents.fronts):
        if front.sensitivities:
            anchor = f"sensitivity-{number}"
            drawn[anchor] = _sensitivity_chart(front)
            parts.append(
                chart(anchor, f"Measured loss of each layer folded alone: {front.name}", _sensitivity_table(front))
            )
    if contents.folds and not contents.fronts:
        parts.append(
            not_measured(
                "The loss of single layers was not measured; this measures it:",
                "headfold frontier ORIGINAL DIR --stats STATS",
            )
        )
    return Section("By layer", parts, drawn) if parts else None


def _shares(site: SitePlan) -> dict[str, float]:
    """Return the predicted errors of K and V as shares of their energy; nothing where none was predicted."""
    if site.error is None or site.energy is None:
        return {}
    return {"key": site.error.key / site.energy.key, "value": site.error.value / site.energy.value}


def _error_rows(fold: Fold) -> list[list[str]]:
    found = {name: _shares(site) for name, site in fold.plan.sites.items()}
    return [
        [name, *(percent(shares[tensor]) if shares else "" for tensor, _ in TENSORS)] for name, shares in found.items()
    ]


def _errors_chart(folds: list[Fold]) -> dict[str, Any]:
    rows = [
        {"fold": fold.name, "site": name, "at": number, "share": shares[tensor], "tensor": f"error of {letter}"}
        for fold in folds
        for number, (name, site) in enumerate(fold.plan.sites.items())
        if (shares := _shares(site))
        for tensor, letter in TENSORS
    ]
    several = len(folds) > 1
    order = [fold.name for fold in folds] if several else [f"error of {letter}" for _, letter in TENSORS]
    field = "fold" if several else "tensor"
    encoding: dict[str, Any] = {
        "x": charts.site_axis(),
        "y": {"field": "share", "type": "quantitative", "title": "share of the energy", "axis": {"format": "~%"}},
        "color": charts.colour(field, field, order),
        "opacity": charts.PICKED_OPACITY,
        "tooltip": charts.tooltip(("fold", "fold", ""), ("site", "site", ""), ("tensor", "", ""), ("share", "share", ".2%")),
    }  # fmt: skip
    if several:
        encoding["strokeDash"] = {"field": "tensor", "type": "nominal", "title": "tensor", "legend": {"orient": "top"}}
    return charts.spec(
        "Predicted error of K and of V at each site", rows, params=[charts.picked(field)], encoding=encoding,
        mark={"type": "line", "point": {"size": 30}, "strokeWidth": 1.5},
    )  # fmt: skip


def _counts(front: Front) -> list[int]:
    return sorted({count for measured in front.sensitivities.values() for count in measured}, reverse=True)


def _sensitivity_table(front: Front) -> Markup:
    counts = _counts(front)
    rows = [
        (name, *(f"{measured[count]:.3g}" if count in measured else "" for count in counts))
        for name, measured in front.sensitivities.items()
    ]
    return table("Loss increase in nats by K/V heads kept", ("site", *map(str, counts)), rows)


def _sensitivity_chart(front: Front) -> dict[str, Any]:
    sites = list(front.sensitivities)
    rows = [
        {"site": name, "at": sites.index(name), "heads": f"{count} K/V heads", "loss": loss}
        for name, measured in front.sensitivities.items()
        for count, loss in measured.items()
    ]
    return charts.spec(
        "Loss increase when a single site is folded",
        rows,
        params=[charts.picked("heads")],
        mark={"type": "line", "point": {"size": 30}, "strokeWidth": 1.5},
        encoding={
            "x": charts.site_axis(),
            "y": {"field": "loss", "type": "quantitative", "title": "loss increase, nats"},
            "color": charts.colour("heads", "kept", [f"{count} K/V heads" for count in _counts(front)]),
            "opacity": charts.PICKED_OPACITY,
            "tooltip": charts.tooltip(("site", "site", ""), ("heads", "kept", ""), ("loss", "loss increase", ".3~g")),
        },
    )  # fmt: skip
