"""Measure every method on one model without training, as `headfold compare` does: medians over calibration seeds.

    python benchmarks/methods.py MODEL --name NAME --kv-heads 4,2,1 --text SOURCE [--limit N] [--calibration SOURCE] [--tokens N]
        [--items N] [--columns A,B] [--context N] [--seeds 3] [--methods NAME,…]

Our default has all seeds, and so has every method without refit; the published methods with refit, which is ours, have the first alone.
Each seed is a comparison of its own, kept in `--work` and resumed there. Results go to benchmarks/results/NAME-methods.json after
each seed; rows of other methods that stand there, of the same settings, stay.
"""

import inspect
import json
import statistics
from typing import Any

from folds import DATA, RESULTS, columns, parser, settings
from machine import describe

import headfold

OURS, REFIT = "absorb", "+refit"
DEFAULT = inspect.signature(headfold.compare).parameters["methods"].default


def listed(found: dict[int, Any], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per method and count: medians over its seeds, and the range of the loss increase.

    `found` has what `headfold.compare` returned, by seed; `others` are rows of earlier calls.
    """
    runs: dict[tuple[str, int], list[Any]] = {}
    for comparison in found.values():
        for row in comparison.rows:
            runs.setdefault((row.method, row.num_kv_heads), []).append(row)
    table = [row for row in others if (row["method"], row["num_kv_heads"]) not in runs]
    for (method, count), rows in runs.items():
        increases = sorted(row.loss_increase for row in rows)
        middle = {
            field: statistics.median(getattr(row, field) for row in rows)
            for field in (
                "value",
                "loss_increase",
                "kl",
                "seconds",
                "peak_bytes",
                "kv_bytes_per_token",
                "weight_bytes",
                "flops_per_token",
            )
            if getattr(rows[0], field) is not None
        }
        table.append(
            {"method": method, "num_kv_heads": count, "metric": rows[0].metric, "original": rows[0].original, "num_seeds": len(rows),
             **middle, "least_loss_increase": increases[0], "greatest_loss_increase": increases[-1]}
        )  # fmt: skip
    return sorted(table, key=lambda row: (-row["num_kv_heads"], row["loss_increase"]))


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--methods", default=",".join(DEFAULT), help="rows, separated by commas")
    options = reader.parse_args()
    data = {name: getattr(options, name) for name in DATA}
    found: dict[int, Any] = {}
    out = RESULTS / f"{options.name}-methods.json"
    kept = json.loads(out.read_text()) if out.exists() else {}
    others = kept["rows"] if kept.get("settings") == settings(options) else []
    for seed in range(options.seeds):
        methods = [
            name for name in options.methods.split(",") if not (seed and name.endswith(REFIT)) or name.startswith(OURS)
        ]
        found[seed] = headfold.compare(
            options.model, options.kv_heads.split(","), methods=methods, out=options.work / f"{options.name}-{seed}",
            columns=columns(options), seed=seed, **data,
        )  # fmt: skip
        facts = {
            "machine": describe(), "model": options.name, "settings": settings(options), "skipped": found[seed].skipped,
        }  # fmt: skip
        out.write_text(json.dumps({**facts, "rows": listed(found, others)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
