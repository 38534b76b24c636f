"""Single numbers that sentences of README and docs quote, by name."""

import statistics
from collections.abc import Callable

from figure_data import load, row
from figure_tables import QUALITY, number

Value = Callable[[], str]


def increase(model: str, name: str, count: int) -> float:
    return row(f"{model}-main", name=name, num_kv_heads=count)["loss_increase"]


def _quality(values: dict[str, Value]) -> None:
    for model in ("pylib-llama", "bundled"):
        values[f"{model}.loss"] = lambda m=model: f"{load(f'{m}-main')['original_nll']:.2f}"
        for kind, name in QUALITY.items():
            for count in (4, 2, 1):
                values[f"{model}.{kind}.{count}"] = lambda m=model, n=name, c=count: number(increase(m, n, c))
        for count in (4, 2, 1):
            for base in ("mean", "procrustes"):
                values[f"{model}.{base}-over-default.{count}"] = lambda m=model, b=base, c=count: (
                    f"{increase(m, QUALITY[b], c) / increase(m, QUALITY['default'], c):.0f}"
                )
            for at, end in ((0, "first"), (-1, "last")):
                values[f"{model}.default.{count}.{end}-sixteenth"] = lambda m=model, c=count, a=at: number(
                    row(f"{m}-main", name=QUALITY["default"], num_kv_heads=c)["loss_increase_by_position"][a]
                )


def _ablation(values: dict[str, Value]) -> None:
    for key, name in {
        "default": "absorb (default)",
        "no-refit": "without refit",
        "no-distances": "without distances",
        "neither": "without distances and refit",
        "w_o-alone": "refit of W_o alone",
    }.items():
        values[f"ablation.{key}"] = lambda n=name: number(row("pylib-llama-ablation", name=n)["loss_increase"])
    for key, name in {
        "own": "calibrated on stdlib",
        "self": "calibrated on self",
        "prose": "calibrated on valid.txt",
    }.items():
        values[f"domains.{key}"] = lambda n=name: number(row("pylib-llama-domains", name=n)["loss_increase"])


def _modalities(values: dict[str, Value]) -> None:
    for model, key, factor, places in (
        ("cifar10-vit", "accuracy", 100, 1),
        ("multi30k-t5", "bleu", 1, 1),
        ("minilm", "cosine", 1, 3),
    ):
        values[f"{model}.original"] = lambda m=model, k=key, f=factor, p=places: f"{f * load(m)['original'][k]:.{p}f}"
        for kind, name in (("default", "absorb (default)"), ("mean", "mean")):
            for found in load(model)["rows"]:
                if found["name"] == name:
                    values[f"{model}.{kind}.{found['num_kv_heads']}"] = lambda r=found, k=key, f=factor, p=places: (
                        f"{f * r[k]['median']:.{p}f}"
                    )


WGQA, ROUTES = "papers-wgqa-multi30k-t5", "papers-routes-cifar10-vit"
UPTRAINING, GROUPINGS = "papers-uptraining-multi30k-t5", "papers-groupings-multi30k-t5"
PAIRS = {
    "kdgqa": ((ROUTES, "KDGQA"), (ROUTES, "GQA"), "accuracy", 1),
    "dgqa-ema": ((ROUTES, "DGQA, EMA"), (ROUTES, "GQA"), "accuracy", 1),
    "dgqa-diff": ((ROUTES, "DGQA, diff"), (ROUTES, "GQA"), "accuracy", 1),
    "pgqa": ((ROUTES, "PGQA"), (ROUTES, "GQA"), "accuracy", 1),
    "vit-ours": ((ROUTES, "ours"), (ROUTES, "MHA"), "accuracy", 1),
    "vit-gqa": ((ROUTES, "GQA"), (ROUTES, "MHA"), "accuracy", 1),
    "wgqa": ((WGQA, "WGQA"), (WGQA, "GQA"), "nll", 3),
    "wmqa": ((WGQA, "WMQA"), (WGQA, "MQA"), "nll", 3),
    "qcqa-ec": ((GROUPINGS, "qcqa-ec"), (WGQA, "GQA"), "nll", 3),
    "qcqa-ac": ((GROUPINGS, "qcqa-ac"), (WGQA, "GQA"), "nll", 3),
    "asymgqa": ((GROUPINGS, "asymgqa"), (WGQA, "GQA"), "nll", 3),
    "asymgqa-unequal": ((GROUPINGS, "asymgqa-unequal"), (WGQA, "GQA"), "nll", 3),
}
"""Name → a row, the row it is compared with, and the quantity: paired differences over the seeds that both have."""


def trained(result: str, name: str, quantity: str) -> dict[int, float]:
    """What a row measures after training at the rate of its table, by seed."""
    facts = load(result)
    rate = facts.get("rate", facts["settings"].get("rate"))
    return {run["key"][2]: run[quantity] for run in facts["runs"] if run["key"][:2] == [name, rate]}


def paired(pair: str) -> str:
    """Mean ± standard deviation of a paired difference."""
    ours, other, quantity, places = PAIRS[pair]
    one, two = trained(*ours, quantity), trained(*other, quantity)
    differences = [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]
    mean = f"{statistics.fmean(differences):+.{places}f}".replace("-", "−")
    return f"{mean} ± {statistics.stdev(differences):.{places}f}"


def _papers(values: dict[str, Value]) -> None:
    for pair in PAIRS:
        values[f"papers.{pair}"] = lambda p=pair: paired(p)
    timed = next(run for run in load(UPTRAINING)["runs"] if run["key"][0] == "seconds")["long"]
    for name, seconds in timed.items():
        slug = name.lower().replace(", ", "-").replace(" ", "-")
        values[f"papers.seconds.{slug}"] = lambda s=seconds: f"{s:.3f}"
        values[f"papers.time-ratio.{slug}"] = lambda s=seconds: f"{s / timed['MHA']:.2f}"


def all_values() -> dict[str, Value]:
    values: dict[str, Value] = {
        "detected.proven": lambda: str(sum(t["proven"] for t in load("detect")["types"].values())),
        "detected.of": lambda: str(len(load("detect")["types"])),
        "detected.transformers": lambda: load("detect")["versions"]["transformers"],
        "conversion.ratio": lambda: f"{load('conversion_time')['ratio']:.2f}",
        "conversion.memory": lambda: f"{load('conversion_time')['peak_anonymous_bytes'] / 1e9:.2f} GB",
    }
    for fill in (_quality, _ablation, _modalities, _papers):
        fill(values)
    return values
