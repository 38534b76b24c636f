"""Tokens of uptraining until a fold is within 1 % of its original trained on the same tokens: our way, and the published one.

    python benchmarks/uptraining.py MODEL --name NAME --kv-heads 2 --text SOURCE --calibration SOURCE [--limit N] [--tokens N]
        [--context N] [--steps N] [--rates 3e-4,1e-3,3e-3] --work DIR

Starts: `mean` (2305.13245: neighbours pooled; all weights trained by the language-model loss with Adafactor), `default` (absorb and
refit; attention trained by distillation with AdamW), `healed` (the same after --heal), and the `original` trained on the same tokens as
`mean` is. Each at a constant rate, every rate of the list tried, in as many calls as wanted; NLL of the held-out text after 1, 2, 4 …
steps. Data that statistics and healing saw counts as tokens too (`before`). A language model's; results go to
benchmarks/results/NAME-uptraining.json after each run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from folds import RESULTS, parser, settings, statistics_of
from machine import describe
from transformers import TrainerCallback

from headfold.checkpoint.reader import Checkpoint
from headfold.core.groups import Groups
from headfold.core.plan import Plan, SitePlan
from headfold.corpus import open_corpus
from headfold.evaluate.perplexity import compare_models
from headfold.recipe import fold
from headfold.recipe.uptraining import uptrain
from headfold.refine import heal
from headfold.stock import open_tokenizer

WITHIN = 1.01
WAYS: dict[str, dict[str, Any]] = {
    "original": {"optimizer": "adafactor", "train": "all"},
    "mean": {"optimizer": "adafactor", "train": "all"},
    "default": {"optimizer": "adamw", "train": "attention"},
    "healed": {"optimizer": "adamw", "train": "attention"},
}
FOLDS: dict[str, dict[str, Any]] = {
    "mean": {"merge": "mean", "group": "contiguous", "refit": False},
    "default": {},
    "healed": {"heal": True},
}
BATCH = 16


class Watched(TrainerCallback):
    """Held-out NLL before the first step, and after 1, 2, 4 … steps and the last."""

    def __init__(self, windows: torch.Tensor, tokens_per_step: int) -> None:
        self.windows, self.per_step, self.found = windows, tokens_per_step, []

    def _look(self, model: Any, step: int) -> None:
        was_training = model.training
        nll = compare_models(model.eval(), None, self.windows).nll
        model.train(was_training)
        self.found.append({"tokens": step * self.per_step, "nll": round(nll, 5)})
        print("  ", self.found[-1], flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        self._look(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        step = state.global_step
        if step & (step - 1) == 0 or step == state.max_steps or step % 64 == 0:
            self._look(model, step)


def held_out(options: Any) -> torch.Tensor:
    """Windows of the held-out text, evenly over the whole of it."""
    tokenizer = open_tokenizer(Path(options.model))
    ids: list[int] = []
    for document in open_corpus(options.text).documents:
        ids += tokenizer(document, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // options.context * options.context]).view(-1, options.context)
    count = min(len(windows), max(1, (options.limit or len(ids)) // options.context))
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def start(options: Any, way: str) -> tuple[Path, int]:
    """The checkpoint that is trained, and the tokens that were seen to make it."""
    place = options.work / way
    if way == "original":  # with a plan that changes nothing, so that it trains as folds do
        if not place.exists():
            shutil.copytree(options.model, place)
            checkpoint = Checkpoint.open(place)
            heads = checkpoint.config["num_attention_heads"]
            sites = {
                f"layers.{layer}.self": SitePlan(Groups.contiguous(heads, heads), "mean", checkpoint.config["head_dim"])
                for layer in range(checkpoint.config["num_hidden_layers"])
            }
            (place / "plan.json").write_text(json.dumps(Plan(sites, "contiguous", checkpoint.fingerprint()).to_json()))
        return place, 0
    if not place.exists():
        fold(options.model, place, kv_heads=options.kv_heads, stats=statistics_of(options, 0), **FOLDS[way])
    calibrated = 0 if way == "mean" else options.tokens or 65_536
    healed = heal.TOKENS if way == "healed" else 0
    return place, calibrated + healed


def reached(run: dict[str, Any], beside: list[dict[str, Any]]) -> int | None:
    """Tokens, those before training included, at which a run is within 1 % of the best original trained on as many."""
    for point in run["curve"]:
        at = [p["nll"] for other in beside for p in other["curve"] if p["tokens"] == point["tokens"]]
        if at and point["nll"] <= WITHIN * min(at):
            return point["tokens"] + run["before"]
    return None


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--steps", type=int, default=256)
    reader.add_argument("--rates", default="3e-4,1e-3,3e-3")
    reader.add_argument("--ways", default="healed,default,original,mean")
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{options.name}-uptraining.json"
    runs = json.loads(out.read_text())["runs"] if out.exists() else []
    windows = held_out(options)
    for way in options.ways.split(","):
        for rate in map(float, options.rates.split(",")):
            if any((run["way"], run["rate"], run["steps"]) == (way, rate, options.steps) for run in runs):
                continue
            print(way, rate, flush=True)
            place, before = start(options, way)
            watched = Watched(windows, BATCH * options.context)
            distill = {"distill": options.model} if way in ("default", "healed") else {}
            found = uptrain(
                place, options.work / "trained", steps=options.steps, data=options.calibration, context=options.context, batch=BATCH,
                learning_rate=rate, schedule="constant", callbacks=[watched], force=True, save_every=10**9, **distill, **WAYS[way],
            )  # fmt: skip
            run = {"way": way, "rate": rate, "steps": options.steps, "before": before, "curve": watched.found}
            runs.append({**run, "seconds": found.seconds, "tokens_per_second": round(found.tokens_per_second, 1)})
            beside = [run for run in runs if run["way"] == "original"]
            rows = [
                {"way": run["way"], "rate": run["rate"], "tokens_until_within_1_percent": reached(run, beside), "last": run["curve"][-1]}
                for run in runs
            ]  # fmt: skip
            facts = {
                "machine": describe(),
                "model": options.name,
                "kv_heads": options.kv_heads,
                "settings": settings(options),
            }
            out.write_text(json.dumps({**facts, "rows": rows, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
