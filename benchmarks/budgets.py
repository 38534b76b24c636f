"""A count of K/V heads per layer against one count everywhere, at equal K/V bytes: what is lost, and how well it is predicted.

    python benchmarks/budgets.py MODEL --name NAME --kv-heads 4,2 [--no-refit] [--text SOURCE] [--limit N]
        [--calibration SOURCE] [--tokens N] [--items N] [--columns A,B] [--context N] [--seeds 3] --work DIR

For every seed and count: `headfold fold --kv-heads`, and `headfold plan --kv-bytes` of the same bytes, spread exactly, by QCQA's second
stage, and exactly over groups that may differ in size; then `headfold fold --plan`; each verified by reload and measured against the
original. Layers are measured once per seed and kind of groups, as `plan` does. Results go to benchmarks/results/NAME-budgets.json after
each row, so an interrupted run goes on.
"""

import json
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

from folds import RESULTS, loss, measure, parser, settings, statistics_of
from machine import describe

from headfold.budget import total
from headfold.planning import parse_group
from headfold.recipe import plan
from headfold.recipe.deciding import budget_curves
from headfold.recipe.frontier import site_correlation
from headfold.recipe.source import open_source, open_stats, silent
from headfold.recipe.spreading import Curves
from headfold.recipe.wish import BudgetRequest

SPREADS = {
    "one count": ("swap", "exact"), "exact": ("swap", "exact"), "qcqa": ("swap", "qcqa"), "exact, unequal": ("swap:unequal=true", "exact"),
}  # fmt: skip
"""Rows: how heads are grouped, and how counts are spread."""
Key = tuple[int, str, int]
"""Count of heads whose bytes are spent, spread, seed."""


def table(runs: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over seeds, and losses as shares of those of one count everywhere."""
    rows = []
    for count, name in dict.fromkeys(key[:2] for key in runs):
        same = [run for key, run in runs.items() if key[:2] == (count, name)]
        plain = [run for key, run in runs.items() if key[:2] == (count, "one count")]
        lost, beside = (statistics.median(map(loss, some)) for some in (same, plain))
        rows.append({
            "bytes_of": count, "spread": name, "num_seeds": len(same), "loss": lost,
            "rise": statistics.median(run["rise"] for run in same), "of_one_count": lost / beside if beside > 0 else None,
            "predicted": statistics.median(run["predicted"] for run in same),
        })  # fmt: skip
    return rows


def _sensitivity(options: Namespace, group: str, seed: int) -> Path:
    return options.work / f"sensitivity-{'' if group == 'swap' else 'unequal-'}{seed}.json"


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--no-refit", action="store_true")
    options = reader.parse_args()
    out = RESULTS / f"{options.name}-budgets.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    runs: dict[Key, dict[str, Any]] = {tuple(run.pop("key")): run for run in found.get("runs", [])}
    agreement: list[float] = found.get("site_rank_correlations", [])
    source = open_source(options.model)
    full, every = source.kv_bytes_per_token(), max(site.num_kv_heads for site in source.sites)
    refit = not options.no_refit
    for seed in range(options.seeds):
        stats = statistics_of(options, seed)
        given = open_stats(stats, source)
        made: dict[str, Curves] = {}
        for group in dict.fromkeys(group for group, _ in SPREADS.values()):
            wish = BudgetRequest(kv_budget="1/2", unequal=parse_group(group).unequal)
            made[group], run = budget_curves(
                source, wish, group, "absorb", given, seed, _sensitivity(options, group, seed), 1, None, silent, refit
            )
            run.close()
        agreement = [*agreement[:seed], site_correlation(made["swap"])]
        for count in map(int, options.kv_heads.split(",")):
            for name, (group, spread) in SPREADS.items():
                key = (count, name, seed)
                if key in runs:
                    continue
                options_of = made[group].options
                if name == "one count":
                    counts = dict.fromkeys(options_of, count)
                    how: dict[str, Any] = {"kv_heads": count}
                else:
                    how = {"plan": options.work / "plan.json"}
                    chosen = plan(
                        options.model, how["plan"], kv_bytes=str(full * count // every), spread=spread, group=group, stats=stats,
                        refit=refit, sensitivity=_sensitivity(options, group, seed), seed=seed, force=True,
                    )  # fmt: skip
                    counts = {site: chosen.num_kv_heads[site] for site in options_of}
                predicted = total(options_of, counts).loss
                measured = measure(options, seed, refit=refit, **how)
                runs[key] = {"kv_heads": list(counts.values()), "predicted": predicted, **measured}
                print(key, list(counts.values()), {k: measured[k] for k in ("rise", "kl")}, flush=True)
                facts = {"machine": describe(), "model": options.name, "settings": settings(options)}
                listed = [{"key": list(key), **run} for key, run in runs.items()]
                rest = {"site_rank_correlations": agreement, "rows": table(runs), "runs": listed}
                out.write_text(json.dumps({**facts, **rest}, indent=1) + "\n")


if __name__ == "__main__":
    main()
