"""Compare head_dim multiples at equal K/V bytes: the loss increase, where in the context it falls, and what it costs.

    python benchmarks/wide.py MODEL --name NAME --kv-heads 4,2 --head-dim-multiples 1,2,4 [--no-refit] [--text SOURCE] [--limit N]
        [--calibration SOURCE] [--tokens N] [--items N] [--columns A,B] [--context N] [--seeds 3] --work DIR

Every row is `headfold fold` as a user runs it, verified by reload, then `headfold eval` against the original. Results go to
benchmarks/results/NAME-wide.json after each row, so an interrupted run resumes.
"""

import json
import statistics
from typing import Any

from folds import RESULTS, measure, parser, settings
from machine import describe

Key = tuple[int, int, bool, int]
"""Cache in heads of the source, head_dim multiple, whether refitted, seed."""


def table(runs: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over seeds, and losses relative to the fold of multiple 1."""
    rows = []
    for count, multiple, refit in dict.fromkeys(key[:3] for key in runs):
        same = [run for key, run in runs.items() if key[:3] == (count, multiple, refit)]
        plain = [run for key, run in runs.items() if key[:3] == (count, 1, refit)]
        row = {"cache_of": count, "head_dim_multiple": multiple, "refit": refit, "num_seeds": len(same)}
        for field in ("loss_increase", "kl"):
            values = [run[field] for run in same if run[field] is not None]
            if values:
                middle = statistics.median(values)
                row |= {field: middle, f"least_{field}": min(values), f"greatest_{field}": max(values)}
                base = statistics.median(run[field] for run in plain) if plain else 0
                row[f"{field}_of_plain"] = middle / base if base > 0 else None
        rows.append(row)
    return rows


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--no-refit", action="store_true", help="leave out the refit")
    reader.add_argument("--head-dim-multiples", default="1,2,4", help="multiples, separated by commas")
    options = reader.parse_args()
    out = RESULTS / f"{options.name}-wide.json"
    kept = json.loads(out.read_text())["runs"] if out.exists() else []
    runs: dict[Key, dict[str, Any]] = {tuple(run.pop("key")): run for run in kept}
    for seed in range(options.seeds):
        for count in map(int, options.kv_heads.split(",")):
            for multiple in map(int, options.head_dim_multiples.split(",")):
                key = (count, multiple, not options.no_refit, seed)
                if key in runs or count % multiple:
                    continue
                runs[key] = measure(
                    options, seed, kv_heads=count, head_dim_multiple=multiple, refit=not options.no_refit
                )
                print(
                    key,
                    {k: v for k, v in runs[key].items() if k in ("loss_increase", "kl", "seconds", "class")},
                    flush=True,
                )
                listed = [{"key": list(key), **run} for key, run in sorted(runs.items())]
                facts = {
                    "machine": describe(),
                    "model": options.name,
                    "settings": settings(options),
                    "rows": table(runs),
                }
                out.write_text(json.dumps({**facts, "runs": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
