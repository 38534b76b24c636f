"""Uptrain a translator, figures 4 and 5 and table 1 (2305.13245): how to start, how long to train, what it costs and saves.

    python -m benchmarks.papers.uptraining MODEL --train EN.gz,DE.gz --validation EN.gz,DE.gz --test EN.gz,DE.gz --work DIR [--bf16]

The same as in the paper: a T5 (gated, version 1.1) with MHA left in the encoder, decoder self- and cross-attention of neighbouring
heads pooled by mean, their first or drawn anew, trained on with the data and loss of the model's own training by Adafactor at 1e-3,
constant. Not the same: our T5 has 3 + 3 layers of 8 heads and was trained on the task itself (Multi30k English → German), so there is no
task fine-tuning after the uptraining: step 0 is zero-shot, where theirs is fine-tuned. The length of the model's own training is not
recorded with it. Shares are therefore of one pass over its training pairs, which is no less than the paper's alpha (of all passes).
Rates three times as large and as small are tried on one seed (validation loss at the last step). Seconds per
sample are of greedy translation of `LONG` source tokens with `WRITTEN` to write, in batches of `SENTENCES`: the original by stock
transformers, folds by headfold's runtime, in turn, medians of `TIMES` rounds.
"""

import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, TrainerCallback

import headfold
from benchmarks.papers.runs import Data, Folds, Table, mean_and_deviation, parser, recipe_of, settings, train

RATE = 1e-3
OTHER_RATES = (3e-4, 3e-3)
TRIED = ("MQA, mean", "MQA, ours")
SHARES = (0.0, 0.01, 0.02)
LONG, WRITTEN, SENTENCES, TIMES = 1024, 64, 16, 3
ROWS: dict[str, tuple[str | None, int]] = {
    "MQA, mean": ("mean", 1),
    "MQA, ours": ("ours", 1),
    "MQA, first": ("first", 1),
    "MQA, random": ("random", 1),
    "GQA-2, mean": ("mean", 2),
    "MHA": (None, 8),
}
PUBLISHED = {
    "figure 4": "T5-Large to MQA, alpha 0.05, average of three tasks, read off by others: mean 55.6, first 55.4, random 55.2",
    "figure 5": "T5-XXL after task fine-tuning: GQA-8 is usable at alpha 0, MQA needs some; both gain to 0.05, little more to 0.1",
    "table 1": {
        "columns": ["seconds per sample", "average", "WMT BLEU"], "MHA-Large": [0.37, 46.0, 27.7], "MHA-XXL": [1.51, 47.2, 28.4],
        "MQA-XXL": [0.24, 46.6, 28.5], "GQA-8-XXL": [0.28, 47.1, 28.4],
    },
}  # fmt: skip


class Curve(TrainerCallback):
    """Measures the model at given steps; the points are kept as [share, measures]."""

    def __init__(self, data: Data, marks: dict[int, float]) -> None:
        self.data, self.marks, self.points = data, marks, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if state.global_step in self.marks:
            model.eval()
            written = state.global_step == state.max_steps
            self.points.append({"share": self.marks[state.global_step], **self.data.measure(model, written)})
            model.train()


def run(data: Data, folds: Folds, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Uptrain one row and measure it on the way."""
    how, num_kv_heads = ROWS[name]
    model, last = folds.open(how, num_kv_heads, seed), SHARES[-1]
    marks = {round(folds.options.steps * share / last): share for share in SHARES[1:]}
    curve = Curve(data, marks if rate == RATE else {})
    recipe = recipe_of(folds.options, rate, seed, optimizer="adafactor", schedule="constant")
    found = train(model, data.stream(seed), recipe, folds.options.work, [curve])
    if seed == 0 and name in TRIED:
        found["validation_nll"] = data.validation_loss(model)
    return found | {"curve": curve.points}


def before(data: Data, folds: Folds, name: str, seed: int) -> dict[str, Any]:
    """Measure a row before training."""
    how, num_kv_heads = ROWS[name]
    return data.measure(folds.open(how, num_kv_heads, seed))


def seconds(data: Data, folds: Folds) -> dict[str, Any]:
    """Return seconds per sample of rows of table 1 before training, which decode as they do after it."""
    models = {}
    for name in ("MHA", "MQA, mean", "GQA-2, mean"):
        how, num_kv_heads = ROWS[name]
        models[name] = (
            AutoModelForSeq2SeqLM.from_pretrained(folds.options.model, dtype=torch.float32).eval()
            if how is None
            else headfold.load(folds.path(how, num_kv_heads), dtype=torch.float32)
        )
    ids = torch.cat([batch["input_ids"].flatten() for batch in data.first(200)])
    ids = ids[ids > 1][: SENTENCES * LONG].view(SENTENCES, LONG)
    taken: dict[str, list[float]] = {}
    for _ in range(TIMES):
        for name, model in models.items():
            started = time.perf_counter()
            with torch.no_grad():
                model.generate(ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, num_beams=1, do_sample=False)
            taken.setdefault(name, []).append((time.perf_counter() - started) / SENTENCES)
    return {"long": {name: statistics.median(values) for name, values in taken.items()}}


def rows(table: Table) -> list[dict[str, Any]]:
    """Return the table."""
    listed = []
    for name in ROWS:
        starts = [found for key, found in table.runs.items() if key[:2] == (name, "before")]
        after = [found["curve"] for key, found in table.runs.items() if key[:2] == (name, RATE)]
        by_share = {0.0: starts} | {share: [p for c in after for p in c if p["share"] == share] for share in SHARES[1:]}
        row: dict[str, Any] = {"row": name}
        for share, points in by_share.items():
            for quantity in ("bleu", "nll"):
                values = [point[quantity] for point in points if point.get(quantity) is not None]
                row.setdefault(quantity, {}).update({str(share): mean_and_deviation(values)} if values else {})
        listed.append(row | table.by_rate(name, "validation_nll"))
    return listed


def main() -> None:
    options = parser(__doc__).parse_args()
    data = Data(options)
    options.steps = round(SHARES[-1] * data.num_training / options.batch)
    folds = Folds(options, data.kind)
    asked = {
        **settings(options), "rate": RATE, "shares": SHARES, "optimizer": "adafactor", "schedule": "constant",
        "long": {"source_tokens": LONG, "written": WRITTEN, "sentences": SENTENCES, "rounds": TIMES},
    }  # fmt: skip
    facts = {"paper": "2305.13245", "settings": asked, "published": PUBLISHED}
    table = Table(f"uptraining-{options.model.name}", facts)
    for seed in range(options.seeds):
        for name, (how, _) in ROWS.items():
            if not seed or how == "random":
                table.run((name, "before", seed), lambda name=name, seed=seed: before(data, folds, name, seed))
            table.run((name, RATE, seed), lambda name=name, seed=seed: run(data, folds, name, RATE, seed))
            table.write(rows=rows(table))
    table.run(("seconds", "before", 0), lambda: seconds(data, folds))
    for rate in OTHER_RATES:
        for name in TRIED:
            table.run((name, rate, 0), lambda name=name, rate=rate: run(data, folds, name, rate, 0))
    table.write(rows=rows(table))


if __name__ == "__main__":
    main()
