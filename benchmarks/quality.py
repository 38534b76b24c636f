"""Measure what folding loses without training: loss increase on held-out text by method, K/V heads and calibration seed.

    python benchmarks/quality.py MODEL --name NAME [--rows main|ablation|domains] [--seeds 3] [--context N] [--text FILE…]

Every row is measured on the same windows of held-out text, all of it or, with `--windows`, that many spread evenly over it. Folds are
measured as their head-repeated twins in memory (a fold and its twin are equal; `headfold fold` verifies that each time).
Baselines get the same statistics as ours. The mean has no seed; rows beside the bars are measured with one, all others with
`--seeds`. Results go to benchmarks/results/NAME-ROWS.json after each row, so an interrupted run resumes; a row measured with
fewer seeds than asked is measured again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import describe
from torch import Tensor

from headfold import calibration, planning
from headfold.conversion.source import Source, open_source
from headfold.core.fitted import FittedHeads
from headfold.core.plan import Plan
from headfold.core.stats import SiteStats
from headfold.corpus.windows import draw_windows, token_stream
from headfold.evaluate.perplexity import compare_models, split_windows
from headfold.hf_models import open_model, open_tokenizer
from headfold.refine.refit import VALUE_STEPS, refit
from headfold.surgery import query_order, site_heads, site_tensors

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One method, with the options of the command line."""

    name: str
    group: str
    merge: str
    refit: bool
    value_steps: int = VALUE_STEPS
    source: str = "stdlib"
    tokens: int = 65_536
    seeds: int = 3


BASELINES = (
    Row("mean", "contiguous", "mean", False, seeds=1),
    Row("procrustes + norm", "swap:cost=procrustes", "procrustes:norm=true", False),
    Row("procrustes", "swap:cost=procrustes", "procrustes", False, seeds=1),
)
REFITTED = (
    Row("mean + refit", "contiguous", "mean", True, seeds=1),
    Row("procrustes + norm + refit", "swap:cost=procrustes", "procrustes:norm=true", True, seeds=1),
)
DEFAULT = Row("absorb (default)", "swap", "absorb", True)
ABLATION = (
    DEFAULT,
    Row("without refit", "swap", "absorb", False),
    Row("without distances", "swap", "absorb:distances=false", True),
    Row("without distances and refit", "swap", "absorb:distances=false", False),
    Row("refit of W_o alone", "swap", "absorb", True, value_steps=0),
    Row("without swap", "contiguous", "absorb", True),
    Row("without query weighting", "swap", "absorb:query_weighting=false", True),
    Row("without W_o weighting", "swap", "absorb:output_weighting=false", True),
    Row("swap by K error alone", "swap:cost=absorb:value_weight=0", "absorb", True),
    Row("swap with V error × 3", "swap:cost=absorb:value_weight=3", "absorb", True),
)


def domains(prose: str | None) -> tuple[Row, ...]:
    """Return rows of the default, calibrated on other text than it is measured on."""
    sources = ["stdlib", "self", *([prose] if prose else [])]
    sizes = [Row(f"stdlib, {n // 1024} Ki tokens", "swap", "absorb", True, tokens=n) for n in (16_384, 262_144)]
    return (*(Row(f"calibrated on {Path(s).name}", "swap", "absorb", True, source=s) for s in sources), *sizes)


class Bench:
    """One model, its held-out windows, and the statistics of each seed and source, measured once."""

    def __init__(self, model: str, texts: list[Path], context: int, max_windows: int | None) -> None:
        self.source: Source = open_source(model)
        path = self.source.checkpoint.path
        self.model = open_model(path, dtype=torch.float32)
        self.original = {name: p.detach().clone() for name, p in self.model.named_parameters() if "self_attn" in name}
        self.tokenizer, self.context = open_tokenizer(path), context
        stream = token_stream((text.read_text(encoding="utf-8") for text in texts), self.tokenizer)
        every = split_windows(stream, context)
        self.windows = every[:: max(1, len(every) // max_windows)] if max_windows else every
        self.share = len(self.windows) / len(every)
        self._measured: dict[tuple, tuple[Tensor, dict[str, SiteStats]]] = {}
        self.base = compare_models(self.model, None, self.windows, num_bins=16)

    def measured(self, row: Row, seed: int) -> tuple[Tensor, dict[str, SiteStats]]:
        """Return calibration windows and their statistics."""
        key = (row.source, row.tokens, seed)
        if key not in self._measured:
            windows = draw_windows(
                row.source,
                tokenizer=self.tokenizer,
                model=self.model,
                num_tokens=row.tokens,
                context=self.context,
                seed=seed,
            )
            self._measured[key] = windows, calibration.collect(self.model, self.source.sites, {"input_ids": windows})
        return self._measured[key]

    def score(self, row: Row, num_kv_heads: int, seed: int) -> dict:
        """Fold once in memory and return the loss increase."""
        windows, stats = self.measured(row, seed)
        started = time.monotonic()
        read = self.source.checkpoint.read
        plan = planning.make_plan(
            self.source.sites, read, num_kv_heads, source="", group=row.group, merge=row.merge, stats=stats, seed=seed
        )
        refits = self._refit(row, plan, stats, windows) if row.refit else None
        seconds = time.monotonic() - started
        self._load(plan, stats, refits)
        found = compare_models(self.model, None, self.windows, num_bins=16)
        self._restore()
        return {
            "loss_increase": found.nll - self.base.nll,
            "loss_increase_by_position": [
                one - other for one, other in zip(found.nll_by_position, self.base.nll_by_position, strict=True)
            ],
            "fold_seconds": round(seconds, 2),
        }

    def _refit(self, row: Row, plan: Plan, stats: Mapping[str, SiteStats], windows: Tensor) -> dict[str, FittedHeads]:
        read = self.source.checkpoint.read
        return refit(
            self.model,
            self.source.sites,
            lambda site: site_heads(site, plan, read, stats),
            {"input_ids": windows},
            order=lambda site: query_order(site, plan),
            value_steps=row.value_steps,
        )

    def _load(self, plan: Plan, stats: Mapping[str, SiteStats], refits: Mapping[str, FittedHeads] | None) -> None:
        parameters = dict(self.model.named_parameters())
        for site in self.source.sites:
            made = site_tensors(site, plan, self.source.checkpoint.read, stats, refits, num_kv_heads=site.num_kv_heads)
            for name, tensor in made.items():
                parameters[name].data.copy_(tensor)

    def _restore(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.original:
                parameter.data.copy_(self.original[name])


def median_and_range(scores: list[dict]) -> dict:
    """Return the median over seeds, with the least and the greatest."""
    increases = [score["loss_increase"] for score in scores]
    middle = sorted(scores, key=lambda score: score["loss_increase"])[len(scores) // 2]
    return {
        "loss_increase": statistics.median(increases), "least_loss_increase": min(increases), "greatest_loss_increase": max(increases),
        "num_seeds": len(increases), "fold_seconds": middle["fold_seconds"],
        "loss_increase_by_position": middle["loss_increase_by_position"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--rows", choices=("main", "ablation", "domains"), default="main")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--prose", help="text of another domain, for --rows domains")
    options = parser.parse_args()
    rows = {"main": (DEFAULT, *BASELINES, *REFITTED), "ablation": ABLATION, "domains": domains(options.prose)}[
        options.rows
    ]
    bench = Bench(options.model, options.text, options.context, options.windows)
    out = RESULTS / f"{options.name}-{options.rows}.json"
    head = {
        "machine": describe(), "model": options.name, "context": options.context, "num_windows": len(bench.windows),
        "share_of_text": round(bench.share, 3),
        "tokens": bench.base.num_tokens, "original_nll": bench.base.nll, "original_by_position": bench.base.nll_by_position,
    }  # fmt: skip
    done = json.loads(out.read_text())["rows"] if out.exists() else []
    for row in rows:
        for num_kv_heads in options.kv_heads:
            seeds = range(min(row.seeds, options.seeds))
            before = [r for r in done if r["name"] == row.name and r["num_kv_heads"] == num_kv_heads]
            if any(r["num_seeds"] >= len(seeds) for r in before):
                continue
            found = median_and_range([bench.score(row, num_kv_heads, seed) for seed in seeds])
            print(
                f"{row.name:28s} {num_kv_heads}  {found['loss_increase']:.4f}  "
                f"[{found['least_loss_increase']:.4f}, {found['greatest_loss_increase']:.4f}]",
                flush=True,
            )
            done = [r for r in done if r not in before] + [{**asdict(row), "num_kv_heads": num_kv_heads, **found}]
            out.write_text(json.dumps({**head, "rows": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
