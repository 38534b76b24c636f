"""Compare solvers on the published objectives, weight-sharing error (QCQA) and activation cosine (AsymGQA): objective and seconds.

    python benchmarks/groupings.py MODEL --name NAME --stats STATS

On every site of a model and on one of 32 random heads; equal groups and unequal ones, a quarter of the heads' number. Objectives are
summed over sites and divided by that of neighbours. Results go to benchmarks/results/NAME-groupings.json.
"""

import argparse
import json
import time

import torch
from machine import describe
from quality import RESULTS

from headfold import planning
from headfold.conversion.source import open_source, open_stats
from headfold.core.costs import Cost, around_mean, many
from headfold.families.layout import read_heads
from headfold.group.costs import cosine, wse

SOLVERS = (
    "contiguous", "random", "qcqa", "evolve", "asymgqa", "swap:restarts=1", "swap", "qcqa:unequal=true", "evolve:unequal=true",
    "asymgqa:unequal=true", "swap:restarts=1,unequal=true", "swap:unequal=true", "kmeans",
)  # fmt: skip


SEED = 0


def costs(model: str, stats: str) -> dict[str, list[tuple[int, Cost]]]:
    """Return by objective the heads and a maker of the cost of every site."""
    source = open_source(model)
    given = open_stats(stats, source)
    heads = [(site, read_heads(site, source.checkpoint.read)) for site in source.sites]
    gram = torch.randn(32, 512, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return {
        "wse": [(h.num_kv_heads, lambda h=h: wse.cost(h)) for _, h in heads],
        "cosine": [(h.num_kv_heads, lambda h=h, s=s: cosine.cost(h, given[s.name])) for s, h in heads],
        "wse, 32 random heads": [(32, lambda: around_mean(gram @ gram.T))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--stats", required=True)
    options = parser.parse_args()
    rows = []
    for objective, sites in costs(options.model, options.stats).items():
        base = None
        for name in SOLVERS:
            solver, total = planning.parse_group(name).solver, 0.0
            made = [(num_heads, make()) for num_heads, make in sites]
            started = time.perf_counter()
            for num_heads, cost in made:
                groups = solver(cost, num_heads, num_heads // 4, seed=SEED)
                total += sum(many(cost, list(groups.members)))
            seconds = time.perf_counter() - started
            base = base or total
            rows.append({"objective": objective, "solver": name, "value": total / base, "seconds": seconds})
            print(f"{objective:22s} {name:22s} {total / base:.4f}  {seconds:.3f} s", flush=True)
    (RESULTS / f"{options.name}-groupings.json").write_text(
        json.dumps({"machine": describe(), "seeds": [SEED], "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
