"""The tables of the documentation, one function each: results in, Markdown out."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from figure_data import MODELS, SOURCE_KV_HEADS, load, row, rows

MAIN = ("pylib-llama", "bundled")
METHODS = (
    "mean",
    "mean+refit",
    "first",
    "random",
    "procrustes",
    "procrustes+norm",
    "procrustes+norm+refit",
    "qcqa-ec",
    "qcqa-ac",
    "qcqa-ac+refit",
    "asymgqa",
    "asymgqa+refit",
    "asymgqa-unequal",
    "absorb",
    "absorb+refit",
    "absorb-unequal",
    "absorb-unequal+refit",
    "absorb-wide",
    "absorb-wide+refit",
)


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    cells = [list(header), *(list(line) for line in lines)]
    text = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([text[0], "|" + " --- |" * len(cells[0]), *text[1:]])


def number(value: float | None) -> str:
    """Three significant digits or so: 1.62, 0.523, 0.0203; empty for None."""
    if value is None:
        return ""
    size = abs(value)
    if size >= 10:
        return f"{value:,.0f}" if size >= 100 else f"{value:.1f}"
    text = f"{value:.2f}" if size >= 1 else f"{value:.3f}" if size >= 0.1 else f"{value:.4f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def interval(found: dict[str, Any]) -> str:
    """Median [least, greatest]; the median alone of one seed."""
    middle = number(found["loss_increase"])
    if found["num_seeds"] == 1:
        return middle
    return f"{middle} [{number(found['least_loss_increase'])}, {number(found['greatest_loss_increase'])}]"


def change(value: float, base: float) -> str:
    """Relative to a base, in percent: (−13 %); empty where nothing changes."""
    percent = round(100 * (value / base - 1))
    return f" ({'−' if percent < 0 else '+'}{abs(percent)} %)" if percent else ""


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def cell(name: str, **wanted: Any) -> str:
    """A loss increase with its range, empty where it was not measured."""
    found = rows(name, **wanted)
    return interval(found[0]) if found else ""


def quality() -> str:
    made = []
    for model in MAIN:
        facts, lines = load(f"{model}-main"), []
        for count in (4, 2, 1):
            of = {kind: row(f"{model}-main", name=name, num_kv_heads=count) for kind, name in QUALITY.items()}
            ours, mean, aligned = (of[kind]["loss_increase"] for kind in ("default", "mean", "procrustes"))
            lines.append(
                [f"{count} of 8", *map(interval, of.values()), f"1/{mean / ours:.0f}", f"1/{aligned / ours:.0f}"]
            )
        header = [
            "K/V heads",
            "mean",
            "mean + refit",
            "procrustes, norm",
            "procrustes, norm + refit",
            "default: absorb, swap, refit",
            "default relative to mean",
            "default relative to procrustes",
        ]
        made.append(
            f"**{MODELS[model]}**: loss {facts['original_nll']:.3f} nats per token on {facts['tokens']:,} held-out tokens, "
            f"context {facts['context']}.\n\n{table(header, lines)}"
        )
    return "\n\n".join(made)


QUALITY = {
    "mean": "mean",
    "mean+refit": "mean + refit",
    "procrustes": "procrustes + norm",
    "procrustes+refit": "procrustes + norm + refit",
    "default": "absorb (default)",
}


def methods() -> str:
    def cells(model: str, method: str) -> str:
        found = sorted(rows(f"{model}-methods", method=method), key=lambda r: -r["num_kv_heads"])
        factor = 100 if model == "cifar10-vit" else 1
        increases = [factor * r["loss_increase"] for r in found]
        return " / ".join(f"{v + 0.0:.1f}".replace("-", "−") if factor > 1 else number(v) for v in increases)

    models = list(MODELS)
    return table(["method", *MODELS.values()], [[f"`{m}`", *(cells(model, m) for model in models)] for m in METHODS])


NORMED = {
    "pylib-llama": "pylib-llama, without norms",
    "pylib-qwen3-before": "Qwen 3's class, by a sign per plane",
    "pylib-qwen3": "Qwen 3's class",
    "pylib-olmo2": "OLMo 2's class",
}
"""Model in a file name → its column; the second is the Qwen 3 of the third as version 0.1.0 folds it."""


def normed() -> str:
    def cells(method: str) -> list[str]:
        found = [sorted(rows(f"{m}-methods", method=method), key=lambda r: -r["num_kv_heads"]) for m in NORMED]
        return [" / ".join(number(r["loss_increase"]) for r in each) for each in found]

    whole = [number(load(f"{m}-methods")["rows"][0]["original"]) for m in NORMED]
    lines = [[f"`{m}`", *cells(m)] for m in ("mean", "procrustes+norm", "absorb", "absorb+refit")]
    return table(["method", *NORMED.values()], [["loss of the original", *whole], *lines])


def groupings() -> str:
    by: dict[str, dict[str, Any]] = defaultdict(dict)
    for found in rows("pylib-llama-groupings"):
        by[found["solver"]][found["objective"]] = found
    objectives = ("wse", "cosine", "wse, 32 random heads")
    lines = [
        [f"`{solver}`", *(f"{number(of[o]['value'])} ({of[o]['seconds']:.3f} s)" for o in objectives)]
        for solver, of in by.items()
    ]
    return table(["solver", *objectives], lines)


BUDGETS = {
    "one count": "one count everywhere",
    "exact": "`--kv-bytes`",
    "exact, unequal": "`--kv-bytes`, groups of any size",
    "qcqa": "`--allocation qcqa`",
}


def quantity(model: str) -> tuple[str, float, str]:
    """What a table shows of a model: name, factor and key."""
    if model == "cifar10-vit":
        return "KL in millionths", 1e6, "kl"
    return ("1 − cosine" if model == "minilm" else "nats"), 1, "loss_increase"


def budgets() -> str:
    lines = []
    for model in ("bundled", "pylib-llama", "multi30k-t5", "cifar10-vit", "minilm"):
        unit, factor, key = quantity(model)
        key = "measured" if key == "kl" else key
        for count in sorted({found["bytes_of"] for found in rows(f"{model}-budgets")}, reverse=True):
            of = {a: factor * row(f"{model}-budgets", bytes_of=count, allocation=a)[key] for a in BUDGETS}
            base = of["one count"]
            lines.append(
                [
                    f"{MODELS[model]} ({unit})",
                    f"{count} of {SOURCE_KV_HEADS[model]} heads",
                    *(f"{number(value)}{change(value, base)}" for value in of.values()),
                ]
            )
    return table(["model", "K/V bytes of", *BUDGETS.values()], lines)


def predicted() -> str:
    """The sum of the sensitivities beside what the whole fold loses."""
    lines = []
    for model in ("bundled", "pylib-llama", "multi30k-t5", "cifar10-vit", "minilm"):
        factor = 1e6 if model == "cifar10-vit" else 1
        unit = {"cifar10-vit": "KL in millionths", "minilm": "1 − cosine"}.get(model, "KL in nats")
        for count in sorted({found["bytes_of"] for found in rows(f"{model}-budgets")}, reverse=True):
            cells = []
            for allocation in BUDGETS:
                found = row(f"{model}-budgets", bytes_of=count, allocation=allocation)
                both = (factor * found["predicted"], factor * found["measured"])
                cells.append(" / ".join(map(number, both)))
            lines.append([f"{MODELS[model]} ({unit})", f"{count} of {SOURCE_KV_HEADS[model]} heads", *cells])
    return table(["model", "K/V bytes of", *BUDGETS.values()], lines)


def correlations() -> str:
    def span(values: list[float]) -> str:
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return low if low == high else f"{low} to {high}"

    found = {model: load(f"{model}-budgets")["site_rank_correlations"] for model in MODELS}
    return table(["model", "rank correlation", "seeds"], [[MODELS[m], span(v), str(len(v))] for m, v in found.items()])


def multiples() -> str:
    lines = []
    for model in ("pylib-llama", "bundled", "multi30k-t5", "cifar10-vit"):
        unit, factor, key = quantity(model)
        weights = defaultdict(list)
        for run in load(f"{model}-wide")["runs"]:
            count, multiple, refit, _ = run["key"]
            weights[count, multiple, refit].append(run["weight_bytes"])
        for count in (4, 2):
            cells = []
            plain = factor * row(f"{model}-wide", cache_of=count, head_dim_multiple=1, refit=True)[key]
            for multiple in (1, 2, 4):
                found = rows(f"{model}-wide", cache_of=count, head_dim_multiple=multiple, refit=True)
                if not found:
                    cells.append("")
                    continue
                value = factor * found[0][key]
                share = statistics.median(weights[count, multiple, True]) / statistics.median(weights[count, 1, True])
                more = f" ({value / plain:.2f}; weights × {share:.2f})" if multiple > 1 else ""
                cells.append(f"{number(value)}{more}")
            lines.append([f"{MODELS[model]} ({unit})", f"{count} of 8 heads", *cells])
    return table(["model", "cache of", "multiple 1", "multiple 2", "multiple 4"], lines)


def healing() -> str:
    lines = []
    for model in MODELS:
        for count in sorted({found["num_kv_heads"] for found in rows(f"{model}-healing")}, reverse=True):
            of = {found["way"]: found for found in rows(f"{model}-healing", num_kv_heads=count)}
            healed = [of.get(way, {}) for way in ("heal by block", "heal")]
            show = (lambda found: number(1e6 * found["kl"])) if model == "cifar10-vit" else interval
            cells = [show(of[way]) if way in of else "" for way in ("mean", "refit", "heal by block", "heal")]
            lines.append(
                [
                    f"{MODELS[model]} ({quantity(model)[0]})",
                    f"{count} of {SOURCE_KV_HEADS[model]}",
                    *cells,
                    ", ".join(f"{found['heal_seconds']:.0f}" for found in healed if found),
                    ", ".join(str(found["num_seeds"]) for found in healed if found),
                ]
            )
    return table(
        [
            "model",
            "K/V heads",
            "mean",
            "refit",
            "refit, then heal by block",
            "refit, then heal",
            "seconds of healing",
            "seeds of heal",
        ],
        lines,
    )


WAYS = {
    "original": "the original, trained on",
    "default": "default fold, then distillation",
    "healed": "healed by block, then distillation",
    "mean": "mean pooling, then its own loss",
}


def is_run_of(run: dict[str, Any], found: dict[str, Any]) -> bool:
    same = all(run[key] == found[key] for key in ("way", "rate", "before"))
    return same and run["curve"][-1]["seen"] == found["last"]["seen"]


def uptraining() -> str:
    lines = []
    for model in ("pylib-llama", "cifar10-vit", "multi30k-t5"):
        facts = load(f"{model}-uptraining")
        for found in sorted(facts["rows"], key=lambda r: (list(WAYS).index(r["way"]), r["before"], r["rate"])):
            reached, last = found["within_1_percent_nll"], found["last"]
            start = next(run["curve"][0]["nll"] for run in facts["runs"] if is_run_of(run, found))
            score = f"{last['score']:.1f}" if "score" in last else ""
            lines.append(
                [
                    MODELS[model],
                    WAYS[found["way"]],
                    f"{found['rate']:g}",
                    f"{found['before']:,}",
                    f"{start:.3f}",
                    f"{last['seen']:,} {facts['unit']}",
                    f"{last['nll']:.3f}",
                    score,
                    "not reached" if reached is None else f"{reached:,}",
                ]
            )
    return table(
        [
            "model",
            "way",
            "rate",
            "seen before",
            "loss before",
            "seen in training",
            "loss at the end",
            "accuracy or BLEU",
            "seen when within 1 %",
        ],
        lines,
    )


def training_speed() -> str:
    found = load("training_speed")["rows"]
    names = {"plain": "a plain Trainer", "own loss": "`uptrain`, own loss", "distilled": "`uptrain --distill`"}
    base = found["plain"]["seconds_per_step"]
    return table(
        ["step of", "seconds", "of the plain step"],
        [
            [text, f"{found[key]['seconds_per_step']:.3f}", f"{found[key]['seconds_per_step'] / base:.2f}"]
            for key, text in names.items()
        ],
    )


def listed(name: str, label: str) -> Callable[[], str]:
    """A table of names and loss increases at one count of K/V heads, as the file has them."""

    def made() -> str:
        return table([label, "loss increase (nats)"], [[found["name"], interval(found)] for found in rows(name)])

    return made


def modalities() -> str:
    def median(model: str, key: str, factor: float, name: str, count: int) -> str:
        found = rows(model, name=name, num_kv_heads=count)
        return f"{factor * found[0][key]['median']:.{places[key]}f}" if found else ""

    places = {"accuracy": 1, "bleu": 1, "cosine": 3}
    lines = []
    for model, key, unit, factor in (
        ("cifar10-vit", "accuracy", "accuracy, %", 100),
        ("multi30k-t5", "bleu", "BLEU", 1),
        ("minilm", "cosine", "mean cosine to the original", 1),
    ):
        whole = SOURCE_KV_HEADS[model]
        for count in sorted({found["num_kv_heads"] for found in rows(model)}, reverse=True):
            cells = [
                median(model, key, factor, name, count) for name in ("absorb (default)", "procrustes + norm", "mean")
            ]
            original = f"{factor * load(model)['original'][key]:.{places[key]}f}"
            lines.append([f"{MODELS[model]} ({unit})", f"{count} of {whole}", original, *cells])
    return table(["model", "K/V heads", "original", "default", "procrustes, norm", "mean"], lines)


@dataclass(frozen=True)
class Block:
    """One table: what prints it, and the results it reads, which the line under it names."""

    made: Callable[[], str]
    results: tuple[str, ...]


def of_models(kind: str, models: Iterable[str] = tuple(MODELS)) -> tuple[str, ...]:
    return tuple(f"{model}{kind}" for model in models)


TABLES = {
    "quality": Block(quality, of_models("-main", MAIN)),
    "methods": Block(methods, of_models("-methods")),
    "normed": Block(normed, of_models("-methods", NORMED)),
    "groupings": Block(groupings, ("pylib-llama-groupings",)),
    "budgets": Block(budgets, of_models("-budgets")),
    "predicted-losses": Block(predicted, of_models("-budgets")),
    "rank-correlations": Block(correlations, of_models("-budgets")),
    "head-dim-multiples": Block(
        multiples, of_models("-wide", ("pylib-llama", "bundled", "multi30k-t5", "cifar10-vit"))
    ),
    "healing": Block(healing, of_models("-healing")),
    "uptraining": Block(uptraining, of_models("-uptraining", ("pylib-llama", "cifar10-vit", "multi30k-t5"))),
    "training-speed": Block(training_speed, ("training_speed",)),
    "ablation": Block(listed("pylib-llama-ablation", "default, and changes to it"), ("pylib-llama-ablation",)),
    "domains": Block(listed("pylib-llama-domains", "calibration"), ("pylib-llama-domains",)),
    "modalities": Block(modalities, ("cifar10-vit", "multi30k-t5", "minilm")),
}
