"""Compare healing with refit and mean pooling: folds as a user makes them, verified by reload and measured.

    python benchmarks/healing.py MODEL --name NAME --kv-heads 4,2,1 [--ways NAME,…] [--heal-tokens N] [--text SOURCE] [--limit N]
        [--calibration SOURCE] [--tokens N] [--items N] [--columns A,B] [--context N] [--seeds 3] --work DIR

Rows: `mean` (neighbours pooled, no refit), `refit` (the default fold), `heal` (--heal-by model) and `heal by block`
(--heal-by block), each after a refit that ends as its default is. The first two of the first seed alone: mean pooling sees no data, and
the range of refit is in NAME-main.json. Results go to benchmarks/results/NAME-healing.json after each row, so an interrupted run resumes.
"""

import json
import statistics
from typing import Any

from folds import RESULTS, measure, parser, settings
from machine import describe

Key = tuple[int, str, int]
"""K/V heads, way, seed."""


def ways(heal_tokens: int | None) -> dict[str, dict[str, Any]]:
    """Return how each row is folded."""
    return {
        "mean": {"merge": "mean", "group": "contiguous", "refit": False},
        "refit": {},
        "heal by block": {"heal": True, "heal_by": "block", "heal_tokens": heal_tokens},
        "heal": {"heal": True, "heal_by": "model", "heal_tokens": heal_tokens},
    }


def table(runs: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over seeds, and loss increases relative to those of mean pooling and of refit."""
    rows = []
    for count, way in dict.fromkeys(key[:2] for key in runs):
        values = {
            other: [run["loss_increase"] for key, run in runs.items() if key[:2] == (count, other)] for other in (way, "mean", "refit")
        }  # fmt: skip
        middle = {other: statistics.median(found) for other, found in values.items() if found}
        row = {"num_kv_heads": count, "way": way, "num_seeds": len(values[way]), "loss_increase": middle[way]}
        row |= {"least_loss_increase": min(values[way]), "greatest_loss_increase": max(values[way])}
        same = [run for key, run in runs.items() if key[:2] == (count, way)]
        for field in ("kl", "seconds", "heal_seconds"):
            known = [run[field] for run in same if run.get(field) is not None]
            row |= {field: statistics.median(known)} if known else {}
        row |= {f"of_{other}": middle[way] / middle[other] for other in ("mean", "refit") if middle.get(other, 0) > 0}
        rows.append(row)
    return rows


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--heal-tokens", type=int, help="tokens that the model or every block is trained on")
    reader.add_argument("--ways", default="mean,refit,heal by block,heal", help="rows, separated by commas")
    options = reader.parse_args()
    out = RESULTS / f"{options.name}-healing.json"
    kept = json.loads(out.read_text())["runs"] if out.exists() else []
    runs: dict[Key, dict[str, Any]] = {tuple(run.pop("key")): run for run in kept}
    for seed in range(options.seeds):
        for count in map(int, options.kv_heads.split(",")):
            for way, how in ways(options.heal_tokens).items():
                key = (count, way, seed)
                if key in runs or way not in options.ways.split(",") or (not way.startswith("heal") and seed):
                    continue
                runs[key] = measure(options, seed, kv_heads=count, **how)
                print(
                    key,
                    {k: v for k, v in runs[key].items() if k in ("loss_increase", "kl", "seconds", "heal_seconds")},
                    flush=True,
                )
                listed = [{"key": list(key), **run} for key, run in sorted(runs.items())]
                facts = {
                    "machine": describe(),
                    "model": options.name,
                    "settings": {**settings(options), "heal_tokens": options.heal_tokens},
                    "rows": table(runs),
                }
                out.write_text(json.dumps({**facts, "runs": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
