"""Share what the tables of papers need: open a fold, train it as `headfold uptrain` does, measure it in memory, keep every run."""

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

import headfold
from benchmarks.machine import describe
from headfold.corpus.pairs import read_pairs
from headfold.corpus.samples import Sample, image_sample_blocks, kind_of
from headfold.evaluate import classification, translation
from headfold.hf_models import open_model, open_tokenizer, quiet
from headfold.runtime.load import own_class
from headfold.train.stream import Item, Stream, collate
from headfold.train.trainer import TrainingConfig, Uptrainer, training_arguments

RESULTS = Path(__file__).parents[1] / "results"
CONTEXT = 128
"""Tokens of a sentence."""
MAX_NEW_TOKENS = 60
FOLDS: dict[str, dict[str, Any]] = {
    "mean": {"merge": "mean", "group": "contiguous", "refit": False},
    "first": {"merge": "first", "group": "contiguous", "refit": False},
    "random": {"merge": "random", "group": "contiguous", "refit": False},
    "qcqa-ec": {"merge": "mean", "group": "qcqa", "refit": False},
    "qcqa-ac": {"merge": "mean", "group": "qcqa:unequal=true", "refit": False},
    "asymgqa": {"merge": "mean", "group": "asymgqa", "refit": False},
    "asymgqa-unequal": {"merge": "mean", "group": "asymgqa:unequal=true", "refit": False},
    "ours": {},
}
"""How a fold is made, by its name in a table; ours is the default of `headfold fold`: absorb, swap, refit."""


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser of the model, the data, and where folds lie."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("model", type=Path)
    made.add_argument("--train", required=True, help="source of training and calibration")
    made.add_argument(
        "--validation",
        help="pairs on which learning rates are chosen; images are drawn from --test, others than the table's",
    )
    made.add_argument("--test", required=True)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--items", type=int, default=256, help="of --train, for calibration")
    made.add_argument("--bf16", action="store_true", help="train under autocast; weights and optimizer stay float32")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--limit", type=int, default=300, help="items of --test")
    return made


class ByLength(IterableDataset):
    """Items of a stream, those of one batch about as long, which halves the time: `WINDOW` batches are sorted and divided together."""

    WINDOW = 20

    def __init__(self, stream: Stream, batch: int) -> None:
        super().__init__()
        self.stream, self.batch = stream, batch

    def __iter__(self) -> Iterator[Item]:
        source, draw = iter(self.stream), random.Random(self.stream.seed)
        while True:
            window = sorted(islice(source, self.WINDOW * self.batch), key=lambda item: int((item["labels"] >= 0).sum()))
            starts = list(range(0, len(window), self.batch))
            draw.shuffle(starts)
            for at in starts:
                yield from window[at : at + self.batch]


class Data:
    """Training data by seed, and what is measured on the rest: pairs for an encoder-decoder, labelled images for a classifier."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.batch, self._source = options.model, options.batch, options.train
        self.kind = kind_of(json.loads((self.model / "config.json").read_text()))
        self._stream = Stream(self.kind, options.train, self.model, None, CONTEXT, 0)
        self._by_length = ByLength(self._stream, options.batch)
        if self.kind == "pairs":
            self._tokenizer = open_tokenizer(self.model)
            self._test = read_pairs(options.test, (), options.limit)
            self._validation = read_pairs(options.validation, (), options.limit)
        else:
            images = self._images(options.test, 2 * options.limit)
            self._test, self._validation = images[0::2], images[1::2]  # alternate blocks of one draw

    def _images(self, source: str, count: int) -> list[Sample]:
        blocks = list(image_sample_blocks(source, path=self.model, num_items=count, seed=0))
        whole = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        return [{name: tensor[at : at + 100] for name, tensor in whole.items()} for at in range(0, count, 100)]

    def stream(self, seed: int) -> IterableDataset:
        """Return the training data in the order of a seed."""
        self._stream.seed = seed
        return self._by_length if self.kind == "pairs" else self._stream

    @property
    def num_training(self) -> int:
        """Items in one pass over the training data."""
        return len(read_pairs(self._source)) if self.kind == "pairs" else 0

    def first(self, count: int) -> list[Sample]:
        """Return the first batches of training data."""
        items = islice(self.stream(0), count * self.batch)
        return [collate(list(islice(items, self.batch))) for _ in range(count)]

    def measure(self, model: Any, written: bool = True) -> dict[str, Any]:
        """Measure an open model on the test data; BLEU if translations are to be `written`."""
        if self.kind == "images":
            found = classification.evaluate_classification(model, self._test)
            return {"accuracy": 100 * found.accuracy, "cross_entropy": found.cross_entropy}
        length = MAX_NEW_TOKENS if written else 0
        found = translation.evaluate_translation(
            model, self._test, self._tokenizer, batch_size=100, max_new_tokens=length
        )
        return {"bleu": found.bleu, "nll": found.nll, "eval_seconds": found.seconds}

    def validation_loss(self, model: Any) -> float:
        """Return the loss by which a learning rate is chosen."""
        if self.kind == "images":
            return classification.evaluate_classification(model, self._validation).cross_entropy
        return translation.evaluate_translation(model, self._validation, self._tokenizer, max_new_tokens=0).nll


@dataclass(frozen=True, slots=True)
class Folds:
    """Folds of one model, made once and kept in `work`."""

    options: argparse.Namespace
    kind: str

    def path(self, how: str, num_kv_heads: int, seed: int = 0, **more: Any) -> Path:
        """Return the fold named `how` in `FOLDS`; heads drawn by `random` differ by seed."""
        seed = seed if how == "random" else 0
        made = self.options.work / f"{how}-{num_kv_heads}-{seed}"
        if not made.exists():
            data = {"calibration": self.options.train, "items": self.options.items}
            headfold.fold(self.options.model, made, kv_heads=num_kv_heads, seed=seed, **FOLDS[how], **data, **more)
        return made

    def open(self, how: str | None, num_kv_heads: int, seed: int = 0) -> Any:
        """Open a fold in float32, or the original where `how` is None."""
        directory = self.options.model if how is None else self.path(how, num_kv_heads, seed)
        config = json.loads((directory / "config.json").read_text())
        return open_model(directory, dtype=torch.float32, device="cpu", model_class=own_class(config))


def recipe_of(options: argparse.Namespace, rate: float, seed: int, **more: Any) -> TrainingConfig:
    """Return the settings of a training: AdamW at a rate that falls linearly to zero, no warm-up, no weight decay."""
    given = {"steps": options.steps, "optimizer": "adamw", "schedule": "linear", **more}
    return TrainingConfig(
        learning_rate=rate, warmup=0, batch=options.batch, bf16=options.bf16, save_every=options.steps + 1, seed=seed, **given
    )  # fmt: skip


def train(
    model: Any, stream: IterableDataset, recipe: TrainingConfig, work: Path, callbacks: Sequence[Any] = ()
) -> dict[str, float]:
    """Train all weights, in place, by the model's own loss; return the loss of the last steps, and seconds."""
    model.requires_grad_(True)
    started = time.monotonic()
    trainer = Uptrainer(
        model=model, args=training_arguments(recipe, work / "trainer", "cpu", None, 1), train_dataset=stream, data_collator=collate,
        callbacks=list(callbacks),
    )  # fmt: skip
    with quiet():
        trainer.train()
    shutil.rmtree(work / "trainer", ignore_errors=True)
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"train_loss": statistics.fmean(losses[-3:]), "train_seconds": round(time.monotonic() - started, 1)}


class Table:
    """Runs under their keys in one JSON of benchmarks/results, written after each, so that an interrupted table resumes."""

    def __init__(self, name: str, facts: dict[str, Any]) -> None:
        self._file, self._facts = RESULTS / f"papers-{name}.json", json.loads(json.dumps(facts))
        kept = json.loads(self._file.read_text()) if self._file.exists() else {}
        if kept and kept["settings"] != self._facts["settings"]:
            raise SystemExit(f"{self._file}: rows of other settings; move it away, or give its settings")
        self.runs: dict[tuple, dict[str, Any]] = {tuple(run.pop("key")): run for run in kept.get("runs", [])}

    def run(self, key: tuple, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the run of that key, made if it is not there."""
        if key not in self.runs:
            self.runs[key] = make()
            print(key, {name: value for name, value in self.runs[key].items() if name != "curve"}, flush=True)
            self.write()
        return self.runs[key]

    def by_rate(self, name: str, quantity: str) -> dict[str, dict[str, float]]:
        """Return a quantity of a row's runs by learning rate, to be merged into the row; nothing where one rate alone was tried."""
        found = {str(key[1]): run[quantity] for key, run in self.runs.items() if key[0] == name and quantity in run}
        return {f"{quantity}_by_rate": found} if len(found) > 1 else {}

    def write(self, **more: Any) -> None:
        """Write all runs with `more` facts, such as the table itself."""
        self._facts |= more
        listed = [{"key": list(key), **run} for key, run in self.runs.items()]
        self._file.write_text(json.dumps({"machine": describe(), **self._facts, "runs": listed}, indent=1) + "\n")


def mean_and_deviation(values: Iterable[float]) -> dict[str, float]:
    """Return mean and standard deviation (of the sample) over seeds."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 4), "sd": round(deviation, 4), "seeds": len(values)}


def source_name(source: str) -> str:
    """Return a source without the place where it lies."""
    return ",".join(Path(part).name for part in source.split(","))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what decides a table, without places."""
    facts = {name: value for name, value in vars(options).items() if name not in ("work", "seeds", "row")}
    places = ("model", "train", "validation", "test")
    return {name: source_name(str(value)) if name in places and value else value for name, value in facts.items()}
