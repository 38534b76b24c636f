"""Wide heads against as many bytes of heads of the source's width: what each loses, where in the context, and what it costs.

    python benchmarks/wide.py MODEL --name NAME --kv-heads 4,2 --widths 1,2,4 [--no-refit] [--text SOURCE] [--limit N]
        [--calibration SOURCE] [--tokens N] [--items N] [--columns A,B] [--context N] [--seeds 3] --work DIR

Every row is `headfold fold` as a user runs it, verified by reload, then `headfold eval` against the original. Results go to
benchmarks/results/NAME-wide.json after each row, so an interrupted run goes on.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from machine import describe

from headfold.recipe import calibrate, evaluate, fold
from headfold.recipe.comparing import scored

RESULTS = Path(__file__).parent / "results"
Key = tuple[int, int, bool, int]
"""Cache in heads of the source, width, whether refitted, seed."""


def measure(options: argparse.Namespace, count: int, width: int, refit: bool, seed: int) -> dict[str, Any]:
    """One fold."""
    columns = [name for name in options.columns.split(",") if name]
    stats = options.work / f"stats-{seed}.safetensors"
    if not stats.exists():
        calibrate(
            options.model, stats, calibration=options.calibration, tokens=options.tokens, items=options.items, columns=columns,
            seed=seed,
        )  # fmt: skip
    made = options.work / "folded"
    started = time.monotonic()
    result = fold(
        options.model, made, kv_heads=count, head_width=width, refit=refit, stats=stats, seed=seed, force=True
    )
    seconds = time.monotonic() - started
    more = {} if options.context is None else {"context": options.context}
    found = evaluate(made, reference=options.model, text=options.text, limit=options.limit, columns=columns, **more)
    metric, value, original, rise, kl = scored(found)
    row = {
        "metric": metric, "value": value, "original": original, "rise": rise, "kl": kl, "seconds": round(seconds, 1),
        "kv_bytes_per_token": result.after.kv_bytes_per_token, "weight_bytes": result.after.weight_bytes,
        "flops_per_token": result.after.flops_per_token, "class": "stock" if _is_stock(made) else "headfold's runtime",
        "verified": result.verification is not None and result.verification.passed,
    }  # fmt: skip
    if getattr(found, "nll_by_position", None):
        pairs = zip(found.nll_by_position, found.reference_nll_by_position, strict=True)
        row["rise_by_position"] = [round(one - other, 5) for one, other in pairs]
    return row


def _is_stock(directory: Path) -> bool:
    return "headfold" not in json.loads((directory / "config.json").read_text())


def table(runs: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over seeds, and the rise as a share of the plain fold's."""
    rows = []
    for count, width, refit in dict.fromkeys(key[:3] for key in runs):
        same = [run for key, run in runs.items() if key[:3] == (count, width, refit)]
        plain = [run["rise"] for key, run in runs.items() if key[:3] == (count, 1, refit)]
        rise = statistics.median(run["rise"] for run in same)
        rows.append({
            "cache_of": count, "head_width": width, "refit": refit, "num_seeds": len(same), "rise": rise,
            "least": min(run["rise"] for run in same), "greatest": max(run["rise"] for run in same),
            "of_plain": rise / statistics.median(plain) if plain and statistics.median(plain) > 0 else None,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--kv-heads", required=True)
    parser.add_argument("--widths", default="1,2,4")
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--text")
    parser.add_argument("--calibration")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--items", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--columns", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{options.name}-wide.json"
    kept = json.loads(out.read_text())["runs"] if out.exists() else []
    runs: dict[Key, dict[str, Any]] = {tuple(run.pop("key")): run for run in kept}
    data = {name: getattr(options, name) for name in ("text", "calibration", "limit", "tokens", "items", "context")}
    settings = {key: Path(v).name if key in ("text", "calibration") and v else v for key, v in data.items()}
    for seed in range(options.seeds):
        for count in map(int, options.kv_heads.split(",")):
            for width in map(int, options.widths.split(",")):
                key = (count, width, not options.no_refit, seed)
                if key in runs or count % width:
                    continue
                runs[key] = {"machine": describe()["processor"], **measure(options, *key)}
                print(key, {k: v for k, v in runs[key].items() if k in ("rise", "kl", "seconds", "class")}, flush=True)
                listed = [{"key": list(key), **run} for key, run in sorted(runs.items())]
                facts = {"machine": describe(), "model": options.name, "settings": settings, "rows": table(runs)}
                out.write_text(json.dumps({**facts, "runs": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
