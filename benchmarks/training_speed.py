"""Compare the steps of uptraining with those of a plain transformers Trainer on the same grouped model, in turns within one run.

    python benchmarks/training_speed.py FOLDED --distill ORIGINAL --data SOURCE [--context N] [--batch N] [--rounds 7]

`plain` is a Trainer on the model as transformers opens it, with the same data, optimizer and trained parameters; `own loss` and `distilled`
are headfold's. Times are the processor's own per step, which other work on the machine does not lengthen as much as it does the clock.
Results go to benchmarks/results/training_speed.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from folds import RESULTS
from machine import describe
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from headfold.hf_models import open_tokenizer, quiet
from headfold.train.distillation import Distillation
from headfold.train.sites import find_sites, set_trainable
from headfold.train.stream import Stream, collate
from headfold.train.trainer import MarkComplete, ReportProgress, TrainingConfig, Uptrainer, training_arguments

WARM_UP = 1
SEED = 0


class Timed(TrainerCallback):
    """Records the processor seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def opened(path: str) -> Any:
    """Open a model in float32 with transformers."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def run(way: str, options: argparse.Namespace, directory: Path) -> list[float]:
    """Train a few steps and return the seconds of each but the first ones."""
    config = TrainingConfig(
        steps=WARM_UP + 2, optimizer="adamw", learning_rate=1e-5, schedule="constant", warmup=0, batch=options.batch
    )
    model = opened(options.folded)
    distillation = None
    if way == "distilled":
        distillation = Distillation(opened(options.distill), model, [a.output for a in find_sites(model)])
    stream = Stream(
        "text", options.data, Path(options.folded), open_tokenizer(Path(options.folded)), options.context, seed=SEED
    )
    timed = Timed()
    how = {
        "model": set_trainable(model, "attention"), "args": training_arguments(config, directory, "cpu", None, 1), "train_dataset": stream,
        "data_collator": collate,
    }  # fmt: skip
    if way == "plain":
        trainer = Trainer(**how, callbacks=[timed])
    else:
        reports = ReportProgress(lambda done, total: None, lambda line: None, options.batch * options.context, "tokens")
        trainer = Uptrainer(**how, callbacks=[MarkComplete(), reports, timed], distillation=distillation)
    with quiet():
        trainer.train()
    return timed.seconds[WARM_UP:]


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("folded")
    reader.add_argument("--distill", required=True)
    reader.add_argument("--data", required=True)
    reader.add_argument("--context", type=int, default=256)
    reader.add_argument("--batch", type=int, default=8)
    reader.add_argument("--rounds", type=int, default=7)
    options = reader.parse_args()
    seconds: dict[str, list[float]] = {"plain": [], "own loss": [], "distilled": []}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(options.rounds):
            for way, found in seconds.items():
                found += run(way, options, Path(directory))
    middle = {way: statistics.median(found) for way, found in seconds.items()}
    rows = {
        way: {"seconds_per_step": round(t, 4), "of_plain": round(middle["plain"] / t, 3)} for way, t in middle.items()
    }
    facts = {
        "machine": describe(),
        "seeds": [SEED],
        "model": Path(options.folded).name,
        "batch": options.batch,
        "context": options.context,
    }
    (RESULTS / "training_speed.json").write_text(
        json.dumps({**facts, "rows": rows, "seconds": seconds}, indent=1) + "\n"
    )
    print(rows)


if __name__ == "__main__":
    main()
