"""Per-layer budgets against one count everywhere, at equal K/V bytes: rise in held-out NLL, and how well losses are predicted.

    python benchmarks/budgets.py MODEL --name NAME --context N --text FILE… [--kv-heads 4 2] [--seeds 3] [--windows N]

For every seed: statistics, the damage of each site alone at every count (as `headfold plan --kv-budget` measures it, on 8,192 tokens),
then at the
bytes of each uniform count the exact spread and QCQA's second stage on the same losses. Folds are measured as in quality.py, with refit and
without. Results go to benchmarks/results/NAME-budgets.json.
"""

import argparse
import json
import statistics
from contextlib import AbstractContextManager
from pathlib import Path

from machine import describe
from quality import DEFAULT, RESULTS, Bench

from headfold import budget, planning
from headfold.core.plan import Plan
from headfold.evaluate.perplexity import compare_models
from headfold.evaluate.sensitivity import alone
from headfold.recipe.frontier import rank_correlation
from headfold.recipe.spreading import few, folded_in_memory, predicted_error, refitted


def curves(bench: Bench, seed: int) -> tuple[list[planning.Choice], budget.Options, list[tuple[float, float]]]:
    """Choices of every site, their options, and pairs of predicted error and measured damage."""
    windows, stats = bench.measured(DEFAULT, seed)
    sample = {"input_ids": windows}
    sites, read = bench.source.sites, bench.source.checkpoint.read
    choices = planning.choices(
        sites, read, lambda site: planning.divisors(site.num_groups), grouping=planning.parse_group(DEFAULT.group),
        merge=DEFAULT.merge, stats=stats, seed=seed,
    )  # fmt: skip

    def change(choice: planning.Choice, count: int) -> AbstractContextManager[None]:
        plans = {site.name: plan for site, plan in zip(choice.sites, choice.plans[count], strict=True)}
        plan = Plan(plans, DEFAULT.group, "", seed)
        refits = refitted(choice.sites, plan, bench.source, stats, bench.model, few(sample))
        return folded_in_memory(bench.model, choice.sites, plan, bench.source, stats, refits)

    changes = {
        (choice.sites[0].name, count): lambda c=choice, n=count: change(c, n)
        for choice in choices
        for count in list(choice.plans)[:-1]
    }
    damage = alone(bench.model, few(sample, last=True), changes)
    pairs = [
        (predicted_error(choice, count), lost)
        for choice in choices
        for count, lost in damage[choice.sites[0].name].items()
    ]
    options = {}
    for choice in choices:
        (site,) = choice.sites
        lost = damage[site.name]
        options[site.name] = [budget.Option(n, n * site.head_dim, lost.get(n, 0.0)) for n in choice.plans]
    return choices, options, pairs


def score(bench: Bench, choices: list[planning.Choice], counts: dict[str, int], seed: int) -> dict[str, float]:
    """Rise in NLL with refit and without."""
    windows, stats = bench.measured(DEFAULT, seed)
    chosen = [(choice, counts[choice.sites[0].name]) for choice in choices]
    plan = planning.assemble(bench.source.sites, chosen, DEFAULT.group, "", seed, None)
    found = {}
    for name in ("without_refit", "with_refit"):
        refits = bench._refit(DEFAULT, plan, stats, windows) if name == "with_refit" else None
        bench._load(plan, stats, refits)
        found[name] = compare_models(bench.model, None, bench.windows).nll - bench.base.nll
        bench._restore()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int)
    options = parser.parse_args()
    bench = Bench(options.model, options.text, options.context, options.windows)
    out, rows, correlations = RESULTS / f"{options.name}-budgets.json", {}, []
    for seed in range(options.seeds):
        choices, curve, pairs = curves(bench, seed)
        correlations.append(rank_correlation(pairs))
        for count in options.kv_heads:
            uniform = dict.fromkeys(curve, count)
            limit = budget.total(curve, uniform).kv_bytes
            spreads = {
                "one count": uniform, "exact": budget.spread(curve, max_bytes=limit), "qcqa": budget.spread_qcqa(curve, limit),
            }  # fmt: skip
            for name, counts in spreads.items():
                found = {**score(bench, choices, counts, seed), "predicted": budget.total(curve, counts).loss}
                rows.setdefault((count, name), []).append({"seed": seed, "kv_heads": list(counts.values()), **found})
                print(seed, count, name, list(counts.values()), {k: round(v, 4) for k, v in found.items()}, flush=True)
            facts = {
                "machine": describe(),
                "model": options.name,
                "num_windows": len(bench.windows),
                "tokens": bench.base.num_tokens,
            }
            listed = [
                {
                    "bytes_of": count, "spread": name, "runs": runs,
                    **{key: statistics.median(run[key] for run in runs) for key in ("with_refit", "without_refit", "predicted")},
                }
                for (count, name), runs in rows.items()
            ]  # fmt: skip
            out.write_text(
                json.dumps({**facts, "site_rank_correlations": correlations, "rows": listed}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
