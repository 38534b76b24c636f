"""What was lost: evaluations beside the original, methods and budgets compared."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from ..evaluate.harness import TaskEvaluation
from ..evaluate.perplexity import Evaluation
from ..reports.evaluations import MEASURES
from ..reports.tables import duration, percent, size
from ..timing.cases import BenchResult
from . import charts
from .contents import Contents, Front, MethodTable
from .elements import Section, chart, not_measured, paragraph, subheading, table
from .results import DataResult, EngineCheck, Paired, Result, labels, models_of


def section(contents: Contents) -> Section | None:
    """Return the section; None where nothing was given that has a loss."""
    parts: list[Markup] = []
    drawn: dict[str, Any] = {}
    called = labels(contents.results)
    language = [found for found in contents.results if isinstance(found, Evaluation)]
    others = [found for found in contents.results if isinstance(found, DataResult | TaskEvaluation | Paired)]
    if language:
        parts.append(_language(language, called))
    for found in others:
        parts.append(_other(found, called))
    for fold in contents.folds:
        if fold.name not in _measured(contents.results):
            data = "" if fold.kind == "text" else " --text DATA"
            command = f"headfold eval {fold.word} --reference {contents.original_of(fold)}{data} --json > eval.json"
            parts.append(not_measured(f"The loss of {fold.name} was not measured; this measures it:", command))
    for number, methods in enumerate(contents.tables):
        parts += _methods(methods, f"methods-{number}")
        if methods.rows:
            drawn[f"methods-{number}"] = _methods_chart(methods)
    for number, front in enumerate(contents.fronts):
        parts += _front(front, f"front-{number}")
        if front.points:
            drawn[f"front-{number}"] = _front_chart(front)
    return Section("Loss", parts, drawn) if parts else None


def _measured(results: Sequence[Result]) -> set[str]:
    """Return the names of the models that have a loss, without the directories they lie in."""
    losses = [found for found in results if not isinstance(found, BenchResult | EngineCheck)]
    return {PurePath(name).name for found in losses for name in models_of(found)}


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _language(found: Sequence[Evaluation], called: Mapping[str, str]) -> Markup:
    rows = []
    for one in found:
        if one.reference is not None:
            rows.append((
                called[one.reference], "" if one.reference_kv_bytes_per_token is None else size(one.reference_kv_bytes_per_token),
                _number(one.reference_nll), _number(one.reference_perplexity, ".3f"), "", "", "",
            ))  # fmt: skip
        increase = None if one.reference_nll is None else one.nll - one.reference_nll
        rows.append((
            called[one.model], size(one.kv_bytes_per_token), _number(one.nll), _number(one.perplexity, ".3f"), _number(increase, "+.4f"),
            _number(one.kl), "" if one.top1_agreement is None else percent(one.top1_agreement),
        ))  # fmt: skip
    data = "; ".join(dict.fromkeys(f"{one.num_tokens:,} tokens of {one.text}, context {one.context}" for one in found))
    header = (
        "model", "K/V per token", "NLL, nats per token", "perplexity", "loss increase", "KL to the original", "same likeliest token",
    )  # fmt: skip
    return table(f"Language modelling: {data}", header, list(dict.fromkeys(rows)))


def _other(found: DataResult | TaskEvaluation | Paired, called: Mapping[str, str]) -> Markup:
    if isinstance(found, DataResult):
        known = {field: (label, form) for label, form, field in MEASURES}
        rows = [
            (known[name][0], known[name][1].format(own), "" if beside is None else known[name][1].format(beside))
            for name, (own, beside) in found.measures.items()
            if name in known
        ]
        columns = ("", called[found.model], called.get(found.reference or "", "no reference"))
        return table(f"{found.num_items:,} {found.kind} of {found.source}", columns, rows)
    if isinstance(found, TaskEvaluation):
        tasks = [
            (
                row.task, row.metric, f"{row.num_items:,}", _number(row.value), f"[{row.low:.4f}, {row.high:.4f}]",
                _number(row.reference),
            )
            for row in found.tasks
        ]  # fmt: skip
        header = (
            "task",
            "metric",
            "items",
            called[found.model],
            f"{100 * found.level:.0f} % interval",
            called.get(found.reference or "", "no reference"),
        )
        return table("Tasks", header, tasks)
    paired = [
        (
            called[row.model], row.metric, _number(row.value), _number(row.difference, "+.4f"),
            "" if row.low is None or row.high is None else f"[{row.low:+.4f}, {row.high:+.4f}]",
            _number(row.p, ".2g"), row.verdict or "",
        )
        for row in found.rows
    ]  # fmt: skip
    heads = ("model", "metric", "value", "difference", f"{100 * found.level:.0f} % interval", "p", "")
    return table(f"Paired comparison on {found.source}", heads, paired)


def _loss_title(methods: MethodTable) -> str:
    metric = methods.rows[0].metric
    return "loss increase, nats per token" if metric == "nll" else f"decrease of {metric}"


def _methods(methods: MethodTable, anchor: str) -> list[Markup]:
    title = subheading(f"Methods: {methods.name}")
    if not methods.rows:
        return [title, paragraph("No method has a finite loss yet: run the same headfold compare again.", "absent")]
    best = {
        count: min(row.loss_increase for row in methods.rows if row.num_kv_heads == count) for count in _counts(methods)
    }
    rows = [
        (
            row.method + (" (best)" if row.loss_increase == best[row.num_kv_heads] else ""), str(row.num_kv_heads),
            size(row.kv_bytes_per_token), _number(row.value), _number(row.loss_increase, "+.4f"), _number(row.kl),
            duration(row.seconds), "" if row.peak_bytes is None else size(row.peak_bytes),
        )
        for row in methods.rows
    ]  # fmt: skip
    header = (
        "method",
        "K/V heads",
        "K/V per token",
        methods.rows[0].metric,
        _loss_title(methods),
        "KL",
        "time",
        "memory",
    )
    original = methods.rows[0].original
    note = "" if original is None else f"The original has {original:.4f}. "
    return [
        title,
        chart(anchor, "Loss by method and K/V cache", table("Every method", header, rows)),
        paragraph(f"{note}Click a method in the legend to see it alone.", "note"),
        *(
            [paragraph(f"Without a finite loss, and not shown: {', '.join(methods.lost)}", "note")]
            if methods.lost
            else []
        ),
    ]


def _counts(methods: MethodTable) -> list[int]:
    return list(dict.fromkeys(row.num_kv_heads for row in methods.rows))


def _methods_chart(methods: MethodTable) -> dict[str, Any]:
    places = charts.drawn([row.loss_increase for row in methods.rows])
    rows = [
        {
            "method": row.method, "heads": row.num_kv_heads, "bytes": row.kv_bytes_per_token, "cache": size(row.kv_bytes_per_token),
            "drawn": place, "loss": row.loss_increase, "kl": row.kl,
        }
        for row, place in zip(methods.rows, places, strict=True)
    ]  # fmt: skip
    mean = {
        name: [row.loss_increase for row in methods.rows if row.method == name]
        for name in {row.method for row in methods.rows}
    }
    order = sorted(mean, key=lambda name: (sum(mean[name]) / len(mean[name]), name))
    return charts.spec(
        "Loss of every method by the K/V cache it leaves",
        rows,
        height=340,
        params=[charts.picked("method")],
        mark={"type": "line", "point": {"size": 55}, "strokeWidth": 2},
        encoding={
            "x": charts.cache_axis(row.kv_bytes_per_token for row in methods.rows),
            "y": charts.loss_axis(_loss_title(methods), places),
            "color": charts.colour("method", "method", order),
            "opacity": charts.PICKED_OPACITY,
            "tooltip": charts.tooltip(
                ("method", "method", ""), ("heads", "K/V heads", "d"), ("cache", charts.BYTES_OF_CACHE, ""),
                ("loss", "loss increase", "+.4f"), ("kl", "KL", ".4f"),
            ),
        },
    )  # fmt: skip


def _front(front: Front, anchor: str) -> list[Markup]:
    rows = [
        (
            point.plan, size(point.kv_bytes_per_token), _by_layer(point.num_kv_heads, point.head_dim_multiple),
            "one count" if point.uniform else "best per layer", f"{point.predicted:.3g}", _number(point.measured, ".3g"),
            size(point.weight_bytes),
        )
        for point in front.points
    ]  # fmt: skip
    header = (
        "plan",
        "K/V per token",
        "K/V heads by layer",
        "allocation",
        "predicted loss",
        "measured loss",
        "attention weights",
    )
    agree = [
        (what, value)
        for what, value in (
            ("predicted and measured losses of the points", front.rank_correlation),
            ("predicted errors of single sites and their measured losses", front.site_rank_correlation),
        )
        if value is not None
    ]
    return [
        subheading(f"Budgets: {front.name}"),
        chart(anchor, "Loss by budget", table("Every point", header, rows)),
        *(paragraph(f"Rank correlation of {what}: {value:.2f}", "note") for what, value in agree),
        paragraph(f"A point is made by headfold fold MODEL OUT --plan {front.directory}/PLAN", "note"),
    ]


def _by_layer(counts: Any, multiple: int) -> str:
    return ",".join(map(str, counts.values())) + (f" × {multiple}" if multiple > 1 else "")


def _front_chart(front: Front) -> dict[str, Any]:
    kinds = ("best counts per layer", "one count everywhere")
    predicted = [(point, "predicted", point.predicted) for point in front.points]
    measured = [(point, "measured", point.measured) for point in front.points if point.measured is not None]
    known = predicted + measured
    places = charts.drawn([value for _, _, value in known])
    rows = [
        {
            "kind": kinds[point.uniform], "what": what, "bytes": point.kv_bytes_per_token, "cache": size(point.kv_bytes_per_token),
            "drawn": place, "loss": value, "plan": point.plan, "heads": _by_layer(point.num_kv_heads, point.head_dim_multiple),
        }
        for (point, what, value), place in zip(known, places, strict=True)
    ]  # fmt: skip
    shown = charts.tooltip(
        ("kind", "allocation", ""), ("what", "loss is", ""), ("cache", charts.BYTES_OF_CACHE, ""), ("loss", "loss, nats", ".3~g"),
        ("heads", "K/V heads by layer", ""), ("plan", "plan", ""),
    )  # fmt: skip
    encoding = {
        "x": charts.cache_axis(point.kv_bytes_per_token for point in front.points),
        "y": charts.loss_axis("loss increase (KL to the original, nats)", places),
        "color": charts.colour("kind", "lines: predicted; points: measured", kinds),
        "opacity": charts.PICKED_OPACITY,
        "tooltip": shown,
    }
    line = {
        "mark": {"type": "line", "strokeWidth": 2},
        "transform": [{"filter": "datum.what == 'predicted'"}],
        "params": [charts.picked("kind")],
    }
    points = {
        "mark": {"type": "point", "filled": True, "size": 80},
        "transform": [{"filter": "datum.what == 'measured'"}],
    }
    return charts.spec(
        "Loss of every point of the frontier by its K/V cache",
        rows,
        height=340,
        encoding=encoding,
        layer=[line, points],
    )
