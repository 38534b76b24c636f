"""Train folds until they are within 1 % of the original trained on as much: our way, and the published one.

    python benchmarks/uptraining.py MODEL --name NAME --kv-heads 2 --text SOURCE --calibration SOURCE [--limit N] [--tokens N] [--items N]
        [--columns A,B] [--context N] [--steps N] [--rates 3e-4,1e-3,3e-3] [--ways healed,default,original,mean] [--heal-tokens N] [--bf16]
        --work DIR

Starts: `mean` (2305.13245: neighbours pooled; all weights trained by the model's own loss with Adafactor), `default` (absorb and refit;
attention trained by distillation with AdamW), `healed` (the same after --heal), and the `original` trained as `mean` is. The rate is
constant for those two, as in the paper, and falls to zero for ours, as `headfold uptrain` has it; every rate of the list is tried, in as
many calls as wanted. Measured on held-out data after 0, 1, 2, 4 … steps and every 64th. `seen` counts tokens of a language model, else
pairs or images; what statistics and healing saw is counted too (`before`). Within 1 % is meant of the best that the original has reached,
at any rate, with at most as much training: of its loss (`nll`, an image classifier's cross-entropy), and of its `score` (BLEU, accuracy in
percent) where there is one. Results go to benchmarks/results/NAME-uptraining.json after each run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from folds import RESULTS, columns, parser, settings, statistics_of
from machine import describe
from transformers import TrainerCallback

import headfold
from headfold.conversion.calibration_config import DEFAULT_ITEMS, DEFAULT_TOKENS
from headfold.conversion.teacher import MAX_ITEM_FACTOR
from headfold.corpus import open_corpus
from headfold.corpus.pairs import read_pairs
from headfold.corpus.samples import image_sample_blocks, kind_of
from headfold.evaluate import classification, translation
from headfold.evaluate.perplexity import compare_models
from headfold.hf_models import open_tokenizer
from headfold.refine import heal

SHARE = 0.01
WAYS: dict[str, dict[str, Any]] = {
    "original": {"optimizer": "adafactor", "schedule": "constant", "train": "all"},
    "mean": {"optimizer": "adafactor", "schedule": "constant", "train": "all"},
    "default": {"optimizer": "adamw", "schedule": "linear", "train": "attention"},
    "healed": {"optimizer": "adamw", "schedule": "linear", "train": "attention"},
}
FOLDS: dict[str, dict[str, Any]] = {
    "mean": {"merge": "mean", "group": "contiguous", "refit": False},
    "default": {},
    "healed": {"heal": True, "heal_by": "block"},
}
BATCH = 16


Measure = Callable[[Any], dict[str, float]]


class Watched(TrainerCallback):
    """Measures before the first step, after 1, 2, 4 … steps, every 64th and the last."""

    def __init__(self, measure: Measure, per_step: int) -> None:
        self.measure, self.per_step, self.found = measure, per_step, []

    def _look(self, model: Any, step: int) -> None:
        was_training = model.training
        values = {name: round(value, 5) for name, value in self.measure(model.eval()).items()}
        model.train(was_training)
        self.found.append({"seen": step * self.per_step, **values})
        print("  ", self.found[-1], flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        self._look(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        step = state.global_step
        if step & (step - 1) == 0 or step == state.max_steps or step % 64 == 0:
            self._look(model, step)


def held_out(options: Any, kind: str) -> Measure:
    """Return a function that measures the loss, and the score where a model has one, on the held-out data."""
    if kind == "pairs":
        tokenizer, pairs = (
            open_tokenizer(Path(options.model)),
            read_pairs(options.text, columns(options), options.limit),
        )

        def translated(model: Any) -> dict[str, float]:
            found = translation.evaluate_translation(model, pairs, tokenizer)
            return {"nll": found.nll, "score": found.bleu}

        return translated
    if kind == "images":
        blocks = list(image_sample_blocks(options.text, path=Path(options.model), num_items=options.limit, seed=0))

        def classified(model: Any) -> dict[str, float]:
            found = classification.evaluate_classification(model, blocks)
            return {"nll": found.cross_entropy, "score": 100 * found.accuracy}

        return classified
    windows = evenly(options)
    return lambda model: {"nll": compare_models(model, None, windows).nll}


def evenly(options: Any) -> torch.Tensor:
    """Return windows spread evenly over the held-out text."""
    tokenizer = open_tokenizer(Path(options.model))
    ids: list[int] = []
    for document in open_corpus(options.text).documents:
        ids += tokenizer(document, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // options.context * options.context]).view(-1, options.context)
    count = min(len(windows), max(1, (options.limit or len(ids)) // options.context))
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def start(options: Any, way: str) -> Path:
    """Return the checkpoint that training starts from, made once."""
    place = options.work / (f"{way}-{options.heal_tokens}" if way == "healed" else way)
    if place.exists():
        return place
    if way == "original":  # a fold that keeps every head, so that it has a plan
        config = json.loads((Path(options.model) / "config.json").read_text())
        every = config.get("num_attention_heads") or config["num_heads"]
        headfold.fold(options.model, place, kv_heads=every, merge="first", group="contiguous", refit=False)
    else:
        how = FOLDS[way] | ({"heal_tokens": options.heal_tokens} if way == "healed" else {})
        headfold.fold(options.model, place, kv_heads=options.kv_heads, stats=statistics_of(options, 0), **how)
    return place


def seen_before(options: Any, way: str, kind: str) -> int:
    """Return what statistics and healing ran over to make the start, repetitions counted."""
    if way in ("original", "mean"):
        return 0
    if kind == "text":
        healed = options.heal_tokens or heal.TOKENS
        return (options.tokens or DEFAULT_TOKENS) + (healed if way == "healed" else 0)
    return (options.items or DEFAULT_ITEMS[kind]) * (1 + MAX_ITEM_FACTOR if way == "healed" else 1)


def reached(run: dict[str, Any], runs: list[dict[str, Any]], value: str) -> int | None:
    """Return what a run had seen, before training too, when it came within 1 % of the original's best with at most as much training."""
    sign = -1 if value == "score" else 1
    originals = [point for other in runs if other["way"] == "original" for point in other["curve"]]
    for point in run["curve"]:
        best = min((sign * other[value] for other in originals if other["seen"] <= point["seen"]), default=None)
        if best is not None and sign * point[value] <= best + SHARE * abs(best):
            return point["seen"] + run["before"]
    return None


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every run without its curve."""
    listed = []
    for run in runs:
        values = [value for value in ("nll", "score") if value in run["curve"][0]]
        until = {f"within_1_percent_{value}": reached(run, runs, value) for value in values}
        listed.append({**{key: run[key] for key in ("way", "rate", "before")}, **until, "last": run["curve"][-1]})
    return listed


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--steps", type=int, default=256, help="steps of each run")
    reader.add_argument("--rates", default="3e-4,1e-3,3e-3", help="learning rates, separated by commas")
    reader.add_argument("--heal-tokens", type=int, help="tokens that every block is healed on")
    reader.add_argument("--bf16", action="store_true", help="train under autocast")
    reader.add_argument("--ways", default="healed,default,original,mean", help="starts, separated by commas")
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{options.name}-uptraining.json"
    runs = json.loads(out.read_text())["runs"] if out.exists() else []
    kind = kind_of(json.loads((Path(options.model) / "config.json").read_text()))
    measure, per_step = held_out(options, kind), BATCH * (options.context if kind == "text" else 1)
    for way in options.ways.split(","):
        for rate in map(float, options.rates.split(",")):
            how = {"way": way, "rate": rate, "steps": options.steps, "before": seen_before(options, way, kind)}
            how |= {"schedule": WAYS[way]["schedule"], "bf16": options.bf16}
            if any(how.items() <= {"bf16": False, **run}.items() for run in runs):
                continue
            print(way, rate, flush=True)
            watched = Watched(measure, per_step)
            distill = {"distill": options.model} if way in ("default", "healed") else {}
            found = headfold.uptrain(
                start(options, way), options.work / "trained", steps=options.steps, data=options.calibration, columns=columns(options),
                context=options.context, batch=BATCH, learning_rate=rate, bf16=options.bf16, callbacks=[watched], force=True,
                save_every=10**9, **distill, **WAYS[way],
            )  # fmt: skip
            runs.append(
                {
                    **how,
                    "curve": watched.found,
                    "seconds": found.seconds,
                    "per_second": round(found.tokens_per_second, 1),
                }
            )
            facts = {
                "machine": describe(), "model": options.name, "num_kv_heads": options.kv_heads,
                "unit": "tokens" if kind == "text" else kind, "settings": settings(options), "rows": rows(runs),
            }  # fmt: skip
            out.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
