"""Measure what little calibration costs: by the number of tokens, by the length of windows, and by the kind of text.

    python benchmarks/calibration_amount.py [MODEL] [--prose FILE] [--seeds 3] [--rows tokens|windows|kinds …]
    python benchmarks/calibration_amount.py --texts FILE… --models MODEL…

Loss increase at 2 of 8 K/V heads on held-out text of the bundled model, with and without a refit, and how far each text is from the
model's own (`headfold.adequacy`). With `--texts` only that is measured, of further models on Python, these texts and random letters.
Results go to benchmarks/results/calibration_amount.json after each row, so an interrupted run resumes.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import describe
from quality import Bench, Row
from torch import Tensor

import headfold
from headfold.adequacy.surprise import surprise
from headfold.core.stats import SiteStats
from headfold.corpus.windows import draw_windows
from headfold.hf_models import open_model, open_tokenizer

BUNDLED = Path(headfold.__file__).parent / "bundled"
RESULTS = Path(__file__).parent / "results" / "calibration_amount.json"
KV_HEADS, CONTEXT, WINDOWS = 2, 512, 40
TOKENS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
LENGTHS = (16, 64, 256)
AT_LENGTHS, OF_KINDS = 8192, 4096
"""Tokens of the rows that differ in the length of windows, and in the kind of text."""


def requests(prose: str | None) -> dict[str, list[tuple[Row, int]]]:
    """Return rows with the length of their calibration windows."""
    kinds = ["stdlib", *([prose] if prose else [])]
    return {
        "tokens": [
            (Row(f"{tokens} tokens{'' if refit else ', no refit'}", "swap", "absorb", refit, tokens=tokens), CONTEXT)
            for tokens in TOKENS
            for refit in (True, False)
        ],
        "windows": [
            (Row(f"windows of {length}", "swap", "absorb", True, tokens=AT_LENGTHS), length) for length in LENGTHS
        ],
        "kinds": [
            (Row(Path(kind).stem, "swap", "absorb", True, source=kind, tokens=OF_KINDS), CONTEXT) for kind in kinds
        ],
    }


class Amounts(Bench):
    """A bench whose calibration windows have a length of their own."""

    length = CONTEXT

    def measured(self, row: Row, seed: int) -> tuple[Tensor, dict[str, SiteStats]]:
        """Return calibration windows and their statistics."""
        evaluated, self.context = self.context, self.length
        try:
            return super().measured(row, seed)
        finally:
            self.context = evaluated


def surprises(models: list[str], texts: list[str]) -> Iterator[dict]:
    """Yield how far texts are from what models write."""
    with tempfile.TemporaryDirectory() as folder:
        noise, generator = Path(folder) / "letters.txt", random.Random(0)
        noise.write_text("".join(generator.choice("qxzjkwv ßøæþ") for _ in range(60_000)))
        for path in models:
            model, tokenizer = open_model(path, dtype=torch.float32), open_tokenizer(path)
            for source in ("stdlib", *texts, str(noise)):
                windows = draw_windows(source, tokenizer=tokenizer, model=model, num_tokens=2048, context=256, seed=0)
                found = surprise(model, windows)
                yield {
                    "rows": "texts", "model": Path(path).name, "name": Path(source).stem, "perplexity": found.perplexity,
                    "expected_perplexity": found.expected_perplexity, "excess": found.excess,
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BUNDLED))
    parser.add_argument("--prose", help="a text of another kind than the model's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=["tokens", "windows", "kinds"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before a row after so many")
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--models", nargs="*", default=[])
    options = parser.parse_args()
    if options.texts:
        found = json.loads(options.out.read_text())
        kept = [row for row in found["rows"] if row["rows"] != "texts"]
        found["rows"] = kept + list(surprises(options.models, options.texts))
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        return
    started = time.monotonic()
    bench = Amounts(options.model, [BUNDLED / "heldout.txt"], CONTEXT, WINDOWS)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    found |= {
        "machine": describe(), "model": Path(options.model).name, "num_kv_heads": KV_HEADS, "context": CONTEXT,
        "tokens": sum(map(len, bench.windows)), "original_nll": bench.base.nll,
    }  # fmt: skip
    done = {(row["rows"], row["name"], row["refit"]) for row in found["rows"]}
    for group, listed in requests(options.prose).items():
        for row, length in listed if group in options.rows else []:
            if (group, row.name, row.refit) in done or time.monotonic() - started > options.seconds:
                continue
            bench.length = length
            bench._measured.clear()
            losses, texts = [], []
            for seed in range(options.seeds):
                losses.append(bench.score(row, KV_HEADS, seed)["loss_increase"])
                texts.append(surprise(bench.model, bench.measured(row, seed)[0]))
            found["rows"].append({
                "rows": group, "name": row.name, "refit": row.refit, "tokens": row.tokens, "window": length,
                "loss_increase": statistics.median(losses), "least_loss_increase": min(losses),
                "greatest_loss_increase": max(losses), "num_seeds": options.seeds,
                "perplexity": statistics.median(one.perplexity for one in texts),
                "excess": statistics.median(one.excess for one in texts),
                "least_excess": min(one.excess for one in texts), "greatest_excess": max(one.excess for one in texts),
            })  # fmt: skip
            print(
                group, row.name, row.refit, f"{statistics.median(losses):.4f}", [f"{one.excess:.3f}" for one in texts]
            )
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
