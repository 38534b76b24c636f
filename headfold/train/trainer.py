"""The transformers Trainer for folded models: their objective, checkpoints that are whole or not there, and what people see meanwhile."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..checkpoint.disk import flush
from .distillation import Distillation

WHOLE = "headfold-whole"
"""Lies in a Trainer's checkpoint once all of it is on disk."""
KEPT = 2
"""Checkpoints: while one is written, the last good one stands."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a run trains; all of it is in the run's record."""

    steps: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup: int
    """Steps."""
    batch: int = 16
    """Items of one step, over all processes."""
    accumulate: int = 1
    """Parts in which each process takes its share of a batch."""
    weight_decay: float = 0.0
    bf16: bool = False
    """Autocast; weights and optimizer stay float32."""
    gradient_checkpointing: bool = False
    save_every: int = 500
    log_every: int = 10
    seed: int = 0


OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def arguments(recipe: Recipe, directory: Path, device: str, logs: Path | None, world_size: int) -> TrainingArguments:
    """What the Trainer is told. The batch is divided among processes and parts."""
    share, rest = divmod(recipe.batch, world_size * recipe.accumulate)
    assert share and not rest
    on_gpu = device.startswith("cuda")
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=recipe.accumulate,
        optim=OPTIMIZERS[recipe.optimizer],
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        bf16=recipe.bf16,
        **(_checkpointing() if recipe.gradient_checkpointing else {}),
        save_steps=recipe.save_every,
        save_total_limit=KEPT,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        report_to=[] if logs is None else ["tensorboard"],
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
    )


def _checkpointing() -> dict[str, Any]:
    """Gradient checkpointing, under whichever of its two names this transformers knows."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class Uptrainer(Trainer):
    """Trains by the model's own loss or, with a `distillation`, by that."""

    def __init__(self, *, distillation: Distillation | None = None, **how: Any) -> None:
        super().__init__(**how)
        self._distillation = distillation
        self._parts: dict[str, list[float]] = {}
        self.remove_callback_of_printing()
        if distillation is not None:
            self.model_accepts_loss_kwargs = False  # a mean over the batch's part, not a sum over the batch's tokens

    def remove_callback_of_printing(self) -> None:
        """The Trainer's own printing to stdout, which is for results."""
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, parts = self._distillation(model, inputs)
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value)
        return (loss, None) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Under the names that the model has in memory: the Trainer resumes by those, and passes over all others without a word (a ViT's
        are others on disk)."""
        model = self.model
        if not isinstance(model, PreTrainedModel):
            return super()._save(output_dir, state_dict)
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the means of the loss's parts since the last time."""
        means = {name: math.fsum(values) / len(values) for name, values in self._parts.items()}
        self._parts.clear()
        super().log({**logs, **means}, start_time)


class Whole(TrainerCallback):
    """Marks checkpoints that are whole, so that one cut off by a kill is never resumed from."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for file in directory.rglob("*"):
                if file.is_file():
                    flush(file)
            (directory / WHOLE).touch()
            flush(directory)


def last_whole(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    found: dict[int, Path] = {}
    for path in directory.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None


class Telling(TrainerCallback):
    """Progress by step, and a line with the loss now and then."""

    def __init__(self, advance: Callable[[int, int], None], say: Say, tokens_per_step: int, unit: str) -> None:
        self._advance, self._say, self._tokens, self._unit = advance, say, tokens_per_step, unit
        self._began, self._first = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **rest: Any) -> None:
        self._began, self._first = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            self._advance(state.global_step * self._tokens, state.max_steps * self._tokens)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self._say(self._line(state, logs))

    def _line(self, state: Any, logs: dict[str, float]) -> str:
        passed = max(time.monotonic() - self._began, 1e-3)
        done = state.global_step - self._first
        parts = [f"{name.replace('_', ' ')} {logs[name]:.4f}" for name in ("loss", "kl", "site_error") if name in logs]
        left = passed / max(done, 1) * (state.max_steps - state.global_step)
        rate = f"{done * self._tokens / passed:,.0f} {self._unit}/s"
        return f"step {state.global_step:,} of {state.max_steps:,}: {', '.join(parts)}, {rate}, {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Step, loss, its parts and the learning rate, from the Trainer's history."""
    names = ("step", "loss", "kl", "site_error", "learning_rate", "grad_norm")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry]


def world_size() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))
