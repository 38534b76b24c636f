"""Compare a count of K/V heads per layer with one count everywhere at equal K/V bytes: the loss increase, and how well it is predicted.

    python benchmarks/budgets.py MODEL --name NAME --kv-heads 4,2 [--no-refit] [--text SOURCE] [--limit N]
        [--calibration SOURCE] [--tokens N] [--items N] [--columns A,B] [--context N] [--seeds 3] --work DIR

For every seed and count: `headfold fold --kv-heads`, and `headfold plan --kv-bytes` of the same bytes, allocated exactly, by QCQA's second
stage, and exactly over groups that may differ in size; then `headfold fold --plan`; each verified by reload and measured against the
original. Sensitivities are measured once per seed and kind of groups, as `plan` does. Results go to benchmarks/results/NAME-budgets.json
after each row, so an interrupted run resumes.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from folds import RESULTS, divergence, measure, parser, settings, statistics_of
from machine import describe

import headfold
from headfold.budget.allocation import total
from headfold.budget.curves import CurveRequest, loss_curves, teacher_of_statistics
from headfold.budget.frontier import site_rank_correlation
from headfold.budget.request import BudgetRequest
from headfold.conversion.source import open_source, open_stats
from headfold.core.progress import no_progress
from headfold.hf_models import default_device
from headfold.planning import parse_group

ALLOCATIONS = {
    "one count": ("swap", "exact"), "exact": ("swap", "exact"), "qcqa": ("swap", "qcqa"), "exact, unequal": ("swap:unequal=true", "exact"),
}  # fmt: skip
"""Rows: how heads are grouped, and how counts are allocated."""
Key = tuple[int, str, int]
"""Count of heads whose bytes are spent, allocation, seed."""


def table(runs: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over seeds, and measured losses relative to those of one count everywhere."""
    rows = []
    for count, name in dict.fromkeys(key[:2] for key in runs):
        same = [run for key, run in runs.items() if key[:2] == (count, name)]
        uniform = [run for key, run in runs.items() if key[:2] == (count, "one count")]
        measured, base = (statistics.median(map(divergence, some)) for some in (same, uniform))
        rows.append({
            "bytes_of": count, "allocation": name, "num_seeds": len(same), "measured": measured,
            "loss_increase": statistics.median(run["loss_increase"] for run in same),
            "of_one_count": measured / base if base > 0 else None, "predicted": statistics.median(run["predicted"] for run in same),
        })  # fmt: skip
    return rows


def sensitivity_file(work: Path, group: str, seed: int) -> Path:
    """Return where the sensitivities of a seed and kind of groups lie."""
    return work / f"sensitivity-{'' if group == 'swap' else 'unequal-'}{seed}.json"


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--no-refit", action="store_true", help="leave out the refit")
    options = reader.parse_args()
    out = RESULTS / f"{options.name}-budgets.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    runs: dict[Key, dict[str, Any]] = {tuple(run.pop("key")): run for run in found.get("runs", [])}
    correlations: list[float] = found.get("site_rank_correlations", [])
    source = open_source(options.model)
    source_bytes, refit = source.kv_bytes_per_token(), not options.no_refit
    for seed in range(options.seeds):
        stats = statistics_of(options, seed)
        given = open_stats(stats, source)
        teacher = teacher_of_statistics(source, given, default_device(), None, no_progress)
        curves = {
            group: loss_curves(
                teacher, BudgetRequest(unequal=parse_group(group).unequal), CurveRequest(group, "absorb", refit, seed), given,
                sensitivity_file(options.work, group, seed),
            )
            for group in dict.fromkeys(group for group, _ in ALLOCATIONS.values())
        }  # fmt: skip
        teacher.close()
        correlations = [*correlations[:seed], site_rank_correlation(curves["swap"])]
        for count in map(int, options.kv_heads.split(",")):
            for name, (group, allocation) in ALLOCATIONS.items():
                key = (count, name, seed)
                if key in runs:
                    continue
                options_of = curves[group].options
                if name == "one count":
                    counts = dict.fromkeys(options_of, count)
                    how: dict[str, Any] = {"kv_heads": count}
                else:
                    how = {"plan": options.work / "plan.json"}
                    plan = headfold.plan(
                        options.model, how["plan"], kv_bytes=str(source_bytes * count // source.num_kv_heads), allocation=allocation,
                        group=group, stats=stats, refit=refit, sensitivity=sensitivity_file(options.work, group, seed), seed=seed,
                        force=True,
                    )  # fmt: skip
                    counts = {site: plan.num_kv_heads[site] for site in options_of}
                predicted = total(options_of, counts).loss_increase
                measured = measure(options, seed, refit=refit, **how)
                runs[key] = {"num_kv_heads": list(counts.values()), "predicted": predicted, **measured}
                print(key, list(counts.values()), {k: measured[k] for k in ("loss_increase", "kl")}, flush=True)
                facts = {"machine": describe(), "model": options.name, "settings": settings(options)}
                listed = [{"key": list(key), **run} for key, run in runs.items()]
                rest = {"site_rank_correlations": correlations, "rows": table(runs), "runs": listed}
                out.write_text(json.dumps({**facts, **rest}, indent=1) + "\n")


if __name__ == "__main__":
    main()
