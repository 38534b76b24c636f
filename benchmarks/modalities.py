"""Measure what folding loses without training where there is no RoPE on K: a T5, a ViT and a sentence encoder.

    python benchmarks/modalities.py MODEL --name NAME --calibration SOURCE --items N --text SOURCE [--columns A,B] [--seeds 3]

The kind of model decides what is measured: teacher-forced loss and greedy BLEU, accuracy and cross-entropy, or the cosine of
embeddings to the original's. Folds are measured as their head-repeated twins in memory (a fold and its twin are equal;
`headfold fold` verifies that each time). Baselines get the same statistics as ours; rows without statistics have one seed.
Results go to benchmarks/results/NAME.json after each row, so an interrupted run resumes.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor

from headfold import calibration, planning
from headfold.conversion.source import Source, open_source
from headfold.corpus.pairs import read_pairs
from headfold.corpus.samples import Sample, draw_sample, image_sample_blocks, kind_of
from headfold.evaluate import classification, embedding, translation
from headfold.hf_models import open_model, open_tokenizer
from headfold.refine.refit import refit
from headfold.surgery import query_order, site_heads, site_tensors

RESULTS = Path(__file__).parent / "results"

MAX_NEW_TOKENS = 60
"""Of translations: as the original's own BLEU was measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method, with the options of the command line."""

    name: str
    group: str
    merge: str
    refit: bool
    seeded: bool = True


ROWS = (
    Row("absorb (default)", "swap", "absorb", True),
    Row("mean", "contiguous", "mean", False, seeded=False),
    Row("procrustes + norm", "swap:cost=procrustes", "procrustes:norm=true", False, seeded=False),
    Row("absorb without refit", "swap", "absorb", False),
    Row("absorb, neighbours share", "contiguous", "absorb", True),
    Row("mean + refit", "contiguous", "mean", True, seeded=False),
    Row("procrustes + norm + refit", "swap:cost=procrustes", "procrustes:norm=true", True, seeded=False),
)


class Bench:
    """One model, what it is measured on, and the statistics of each seed, measured once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source: Source = open_source(options.model)
        self.path = self.source.checkpoint.path
        self.kind = kind_of(self.source.checkpoint.config)
        self.columns = tuple(options.columns.split(",")) if options.columns else ()
        self.model = open_model(self.path, dtype=torch.float32)
        self.original = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.reference = open_model(self.path, dtype=torch.float32) if self.kind == "sentences" else None
        self.test = self._test_data()
        self._measured: dict[int, tuple[Sample, dict[str, Any]]] = {}
        self.base = self.measure()

    def _test_data(self) -> Any:
        options = self.options
        if self.kind == "pairs":
            return read_pairs(options.text, self.columns, options.limit, None)
        if self.kind == "sentences":
            return draw_sample(
                self.kind, options.text, path=self.path, num_items=options.limit, context=options.context, seed=None
            )
        return list(
            image_sample_blocks(options.text, path=self.path, num_items=options.limit, seed=None, columns=self.columns)
        )

    @property
    def num_items(self) -> int:
        """The items of the test data."""
        if self.kind == "pairs":
            return len(self.test)
        blocks = self.test if self.kind == "images" else [self.test]
        return sum(len(next(iter(block.values()))) for block in blocks)

    def measure(self) -> dict[str, float]:
        """Measure the model with its present weights."""
        if self.kind == "pairs":
            found = translation.evaluate_translation(
                self.model, self.test, open_tokenizer(self.path), max_new_tokens=MAX_NEW_TOKENS
            )
            return {"nll": found.nll, "bleu": found.bleu}
        if self.kind == "sentences":
            found = embedding.evaluate_embedding(self.model, self.test, self.reference)
            return {"cosine": found.cosine, "rank_correlation": found.rank_correlation}
        found = classification.evaluate_classification(self.model, self.test)
        return {"accuracy": found.accuracy, "cross_entropy": found.cross_entropy}

    def measured(self, seed: int) -> tuple[Sample, dict[str, Any]]:
        """Return the calibration data of a seed and its statistics."""
        if seed not in self._measured:
            sample = draw_sample(
                self.kind, self.options.calibration, path=self.path, num_items=self.options.items,
                context=self.options.context, seed=seed, columns=self.columns,
            )  # fmt: skip
            self._measured[seed] = sample, calibration.collect(self.model, self.source.sites, sample)
        return self._measured[seed]

    def score(self, row: Row, num_kv_heads: int, seed: int) -> dict[str, float]:
        """Fold once in memory, measure, and return that with the seconds that planning and refitting took."""
        sample, stats = self.measured(seed)
        started = time.monotonic()
        read = self.source.checkpoint.read
        plan = planning.make_plan(
            self.source.sites, read, num_kv_heads, source="", group=row.group, merge=row.merge, stats=stats, seed=seed
        )

        def twin(site: Any, refits: Any = None) -> dict[str, Tensor]:
            return site_tensors(site, plan, read, stats, refits, num_kv_heads=site.num_kv_heads)

        def merged(site: Any) -> Any:
            return site_heads(site, plan, read, stats)

        def order(site: Any) -> Any:
            return query_order(site, plan)

        refits = refit(self.model, self.source.sites, merged, sample, order=order) if row.refit else None
        seconds = time.monotonic() - started
        self._load({name: t for site in self.source.sites for name, t in twin(site, refits).items()})
        found = self.measure()
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(self.original[name])
        return {**found, "fold_seconds": round(seconds, 2)}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        named = {name: parameter for site in self.source.sites for name, parameter in site.parameters.items()}
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            parameters[named[name]].data.copy_(tensor)


def median_and_range(scores: list[dict[str, float]]) -> dict[str, Any]:
    """Return the median over seeds, the least and the greatest of every measure."""
    return {
        name: {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
        for name in scores[0]
        for values in [[score[name] for score in scores]]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--text", required=True, help="test data")
    parser.add_argument("--limit", type=int, help="of the test data")
    parser.add_argument("--columns")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2, 1])
    options = parser.parse_args()
    bench, out = Bench(options), RESULTS / f"{options.name}.json"
    print("original", bench.base, flush=True)
    head = {
        "machine": describe(), "model": options.name, "kind": bench.kind, "calibration_items": options.items,
        "test_items": bench.num_items,
        "original": bench.base,
    }  # fmt: skip
    done = json.loads(out.read_text())["rows"] if out.exists() else []
    for row in ROWS:
        for num_kv_heads in options.kv_heads:
            if any(r["name"] == row.name and r["num_kv_heads"] == num_kv_heads for r in done):
                continue
            seeds = range(options.seeds if row.seeded else 1)
            found = median_and_range([bench.score(row, num_kv_heads, seed) for seed in seeds])
            print(f"{row.name:28s} {num_kv_heads}", {k: round(v["median"], 4) for k, v in found.items()}, flush=True)
            done.append({**asdict(row), "num_kv_heads": num_kv_heads, "num_seeds": len(seeds), **found})
            out.write_text(json.dumps({**head, "rows": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
