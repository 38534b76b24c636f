"""Tables of time, of the papers made again, and of the architectures that `headfold detect` knows."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from figure_data import load, rows
from figure_tables import Block, milliseconds, number, table


def per_token(case: dict[str, Any], attention: str, count: int, **more: Any) -> dict[str, Any]:
    found = [r for r in case["rows"] if r["attention"] == attention and r["num_kv_heads"] == [count]]
    return next(r for r in found if all(r[key] == value for key, value in more.items()))


def decode() -> str:
    facts = load("decode")
    lines = []
    for kind, text in (("main", ""), ("padded", ", half of the batch padded")):
        for count in (32, 8):
            of = [
                per_token(facts[f"{kind} {dtype}"], how, count)
                for dtype in ("bfloat16", "float32")
                for how in ("sdpa", "headfold")
            ]
            lines.append([f"{count}{text}", *(milliseconds(found["per_token"]) for found in of)])
    rounds = {kind: facts[f"{kind} bfloat16"]["rounds"] for kind in ("main", "padded")}
    header = [
        "K/V heads",
        "stock `sdpa`, bf16",
        "`headfold.load`, bf16",
        "stock `sdpa`, float32",
        "`headfold.load`, float32",
    ]
    case = facts["main bfloat16"]["rows"][0]
    return (
        f"Prompt of {case['context']:,} tokens, batch {case['batch']}, {facts['main bfloat16']['threads']} threads; medians of "
        f"{rounds['main']} rounds (padded: {rounds['padded']} rounds with a filled cache), in milliseconds.\n\n{table(header, lines)}"
    )


def sweep() -> str:
    """The range of ratios stock / headfold over contexts, batches and counts."""
    lines = []
    for dtype in ("bfloat16", "float32"):
        case, ratios = load("decode")[f"sweep {dtype}"], []
        for ours in (r for r in case["rows"] if r["attention"] == "headfold"):
            stock = per_token(case, "sdpa", ours["num_kv_heads"][0], context=ours["context"], batch=ours["batch"])
            ratios.append(stock["per_token"] / ours["per_token"])
        lines.append([dtype, f"{min(ratios):.1f}", f"{max(ratios):.1f}", str(len(ratios))])
    return table(["dtype", "least ratio", "greatest ratio", "cases"], lines)


def shapes() -> str:
    lines = []
    for name, case in load("decode")["shapes bfloat16"].items():
        counts = sorted({r["num_kv_heads"][0] for r in case["rows"]}, reverse=True)
        times = [milliseconds(per_token(case, how, c)["per_token"]) for how in ("sdpa", "headfold") for c in counts]
        parts = per_token(case, "headfold", 8)["parts"]
        where = ", ".join(f"{milliseconds(parts[p])} {p}" for p in ("weights", "attention", "cache", "rest"))
        lines.append([name, *times, where])
    header = [
        "shape",
        "stock: MHA",
        "stock: 8",
        "stock: 1",
        "headfold: MHA",
        "headfold: 8",
        "headfold: 1",
        "headfold at 8, by part",
    ]
    return table(header, lines)


def by_groups() -> str:
    case = load("decode")["figure6 bfloat16"]
    counts = sorted({r["num_kv_heads"][0] for r in case["rows"]})
    lines = [
        [str(c), *(milliseconds(per_token(case, how, c)["per_token"]) for how in ("headfold", "sdpa"))] for c in counts
    ]
    return table(["K/V heads", "headfold", "stock"], lines)


def kernel() -> str:
    facts, lines = load("decode"), []
    for dtype in ("bfloat16", "float32"):
        shares = {(r["num_kv_heads"], r["keys"]): r for r in facts[f"alone {dtype}"]["rows"]}
        gains = {r["num_kv_heads"]: r["ratio"] for r in facts[f"kernel {dtype}"]["rows"]}
        for (count, keys), found in sorted(shares.items()):
            gain = f"{gains[count]:.2f}" if keys == 4096 and count in gains else ""
            lines.append([dtype, str(count), f"{keys:,}", found["candidate"], f"{100 * found['share']:.0f} %", gain])
    return table(
        ["dtype", "K/V heads", "keys", "fastest path", "of the memory's bandwidth", "gain of the kernel"], lines
    )


def conversion() -> str:
    facts = load("conversion_time")
    lines = [
        ["`cp` with `sync`", f"{facts['median_seconds']['cp']:.1f}", ""],
        [
            "`headfold fold`, mean pooling",
            f"{facts['median_seconds']['fold']:.1f}",
            f"{facts['peak_anonymous_bytes'] / 1e9:.2f} GB",
        ],
    ]
    text = (
        f"A checkpoint of {facts['checkpoint_bytes'] / 1e9:.1f} GB in bf16; medians of {len(facts['runs']['cp'])} runs."
    )
    return f"{text}\n\n{table(['step', 'seconds', 'anonymous memory'], lines)}"


def calibration_speed() -> str:
    lines = [
        [
            r["model"],
            r["dtype"].removeprefix("torch."),
            f"{r['forward_tokens_per_second']:,.0f}",
            f"{r['calibrate_tokens_per_second']:,.0f}",
            f"{r['ratio']:.2f}",
        ]
        for r in rows("calibration_speed")
    ]
    return table(["model", "dtype", "forward pass, tokens/s", "calibration, tokens/s", "ratio"], lines)


def plan_time() -> str:
    lines = [
        [
            str(r["num_kv_heads"]),
            str(r["workers"]),
            str(r["num_layers"]),
            f"{r['seconds']:.0f}",
            f"{r['seconds_of_32_layers']:.0f}",
        ]
        for r in rows("plan_time")
    ]
    return table(["K/V heads", "workers", "layers measured", "seconds", "seconds of 32 layers"], lines)


def plus_minus(found: dict[str, float] | None, places: int, signed: bool = False) -> str:
    """Mean ± standard deviation; a mean alone of one seed, and the number of seeds where there are fewer than three."""
    if not found:
        return ""
    mean = f"{found['mean']:{'+' if signed else ''}.{places}f}".replace("-", "−")
    seeds = found["seeds"]
    return mean + (f" ± {found['sd']:.{places}f}" if seeds > 1 else "") + (f" ({seeds})" if seeds < 3 else "")


def places(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def published(value: Any) -> str:
    return " / ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def rates(row: dict[str, Any]) -> str:
    tried = row.get("validation_nll_by_rate", {})
    return ", ".join(f"{float(rate):g}: {tried[rate]:.3f}" for rate in sorted(tried, key=float))


def wgqa() -> str:
    header = [
        "row",
        "published BLEU / R1 / R1",
        "BLEU before",
        "BLEU trained",
        "loss before",
        "loss trained",
        "minus GQA or MQA",
        "validation loss by rate, seed 0",
    ]
    lines = []
    for r in rows("papers-wgqa-multi30k-t5"):
        over = next((r[key] for key in r if key.startswith("nll_over")), None)
        lines.append(
            [
                r["row"],
                published(r["published"]),
                places(r["bleu_before"], 1),
                plus_minus(r["bleu"], 1),
                places(r["nll_before"], 3),
                plus_minus(r["nll"], 3),
                plus_minus(over, 4, signed=True),
                rates(r),
            ]
        )
    return table(header, lines)


def routes() -> str:
    header = [
        "row",
        "published run, from scratch, %",
        "accuracy before, %",
        "accuracy trained, %",
        "cross-entropy trained",
    ]
    lines = [
        [
            r["row"],
            published(r["published"]),
            places(r["accuracy_before"], 1),
            plus_minus(r.get("accuracy"), 1),
            plus_minus(r.get("cross_entropy"), 3),
        ]
        for r in rows("papers-routes-cifar10-vit")
    ]
    return table(header, lines)


def shares_of_training() -> str:
    facts = load("papers-uptraining-multi30k-t5")
    shares = facts["settings"]["shares"]
    ends = (shares[0], shares[-1])
    header = [
        "row",
        *(f"loss at {s:g}" for s in shares),
        *(f"BLEU at {s:g}" for s in ends),
        "validation loss by rate, seed 0",
    ]
    lines = [
        [
            r["row"],
            *(plus_minus(r["nll"].get(str(s)), 3) for s in shares),
            *(plus_minus(r["bleu"].get(str(s)), 1) for s in ends),
            rates(r),
        ]
        for r in facts["rows"]
    ]
    return table(header, lines)


def groups_trained() -> str:
    header = ["row", "BLEU before", "BLEU trained", "loss before", "loss trained", "validation loss by rate, seed 0"]
    lines = [
        [
            r["row"],
            places(r["bleu_before"], 1),
            plus_minus(r["bleu"], 1),
            places(r["nll_before"], 3),
            plus_minus(r["nll"], 3),
            rates(r),
        ]
        for r in rows("papers-groupings-multi30k-t5")
    ]
    return table(header, lines)


def brief(reason: str, most: int = 160) -> str:
    line = " ".join(reason.replace("|", "/").replace("<", "&lt;").replace("*", "\\*").split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def detected(folds: bool) -> Callable[[], str]:
    """The model types that fold, by what is free on K; or those that do not, and why."""

    def made() -> str:
        types = load("detect")["types"]
        if not folds:
            others = [(name, found) for name, found in types.items() if not found["proven"]]
            return table(["model type", "reason"], [[name, brief(found["reason"])] for name, found in others])
        by = defaultdict(list)
        for name, found in types.items():
            if found["proven"]:
                by[found["key"]].append(name)
        lines = [[key, ", ".join(names)] for key, names in sorted(by.items(), key=lambda item: -len(item[1]))]
        proven = sum(map(len, by.values()))
        return (
            f"{proven} of {len(types)} model types fold under all laws.\n\n{table(['free on K', 'model types'], lines)}"
        )

    return made


def stages() -> str:
    facts = load("stages")
    lines = [
        [stage, f"{row['seconds']:.1f}", f"{row.get('times_forward', 1.0):.2f}", f"{100 * row['share_of_peak']:.0f} %"]
        for stage, row in facts["rows"].items()
        if row["operations"]
    ]
    header = ["stage", "seconds", "times the forward pass", "share of the peak of matrix products in bf16"]
    return f"{facts['model']}, {facts['tokens']:,} tokens in windows of {facts['context']:,}, to one K/V head.\n\n{table(header, lines)}"


def layers() -> str:
    lines = []
    for row in load("layers")["rows"]:
        stages = row["stages_per_layer"]
        whole = row["extrapolated_seconds"] / 3600
        lines.append([
            row["shape"], f"{row['tokens']:,} in windows of {row['context']:,}", f"{row['seconds_per_layer']:.0f}",
            *(f"{stages[stage]:.0f}" for stage in ("calibrate", "plan", "refit", "write", "verify")),
            f"{row['peak_bytes'] / 2**30:.1f} GiB", f"{whole:.1f} h for {row['layers']} layers",
        ])  # fmt: skip
    header = [
        "shape", "tokens", "seconds of a layer", "calibrate", "plan", "refit", "write", "verify", "peak memory, two layers",
        "whole model, extrapolated",
    ]  # fmt: skip
    return table(header, lines)


def contention() -> str:
    facts = load("contention")
    lines = [
        [stage, f"{seconds:.1f}", *(f"{facts['ratios'][case][stage]:.1f}" for case in ("busy", "quota"))]
        for stage, seconds in facts["seconds"]["free"].items()
        if seconds >= 0.1
    ]
    header = [
        "stage",
        "seconds on free cores",
        "beside a busy process: times that",
        "under a quota of one core: times that",
    ]
    return table(header, lines)


BLOCKS = {
    "decode": Block(decode, ("decode",)),
    "decode-sweep": Block(sweep, ("decode",)),
    "decode-shapes": Block(shapes, ("decode",)),
    "decode-by-groups": Block(by_groups, ("decode",)),
    "decode-kernel": Block(kernel, ("decode",)),
    "conversion-time": Block(conversion, ("conversion_time",)),
    "calibration-speed": Block(calibration_speed, ("calibration_speed",)),
    "plan-time": Block(plan_time, ("plan_time",)),
    "stages": Block(stages, ("stages",)),
    "layers": Block(layers, ("layers",)),
    "contention": Block(contention, ("contention",)),
    "papers-wgqa": Block(wgqa, ("papers-wgqa-multi30k-t5",)),
    "papers-routes": Block(routes, ("papers-routes-cifar10-vit",)),
    "papers-uptraining": Block(shares_of_training, ("papers-uptraining-multi30k-t5",)),
    "papers-groupings": Block(groups_trained, ("papers-groupings-multi30k-t5",)),
    "detected": Block(detected(True), ("detect",)),
    "not-detected": Block(detected(False), ("detect",)),
}

__all__ = ["BLOCKS", "number"]
