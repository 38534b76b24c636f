"""The transformers Trainer for folded models: their objective, checkpoints that are whole or not there, and what people see meanwhile."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..checkpoint.disk import flush, write_errors
from ..core.errors import UserError
from ..corpus.pairs import IGNORED
from ..parallel import on_all
from .distillation import Distillation

COMPLETE_MARK = "headfold-whole"
"""Lies in a Trainer's checkpoint once all of it is on disk."""
KEPT = 2
"""Checkpoints: while one is written, the last good one stands."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainingConfig:
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


def training_arguments(
    recipe: TrainingConfig, directory: Path, device: str, logs: Path | None, world_size: int
) -> TrainingArguments:
    """What the Trainer is told. The batch is divided among processes and parts."""
    share, rest = divmod(recipe.batch, world_size * recipe.accumulate)
    assert share and not rest
    on_gpu = device.startswith("cuda")
    told = TrainingArguments(
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
        logging_nan_inf_filter=False,
        report_to=[] if logs is None else ["tensorboard"],
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        # Every process reads for itself: accelerate's other way, one that reads for all, cannot join batches padded to different lengths.
        accelerator_config={"dispatch_batches": False},
    )
    # A process has one GPU. The Trainer would copy the model to all it sees, for a batch of each, and hooks do not survive that.
    _ = told.device  # which counts them
    told._n_gpu = min(told._n_gpu, 1)
    return told


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
        self.model_accepts_loss_kwargs = True  # so that labels are counted over all parts and processes
        self.loss_is_scaled_for_ga = True

    def remove_callback_of_printing(self) -> None:
        """The Trainer's own printing to stdout, which is for results."""
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of a part of the batch, so weighted that parts and processes make the mean over all the labels of a batch.

        The model is not told their count: some (T5) take it and go by their own all the same.
        """
        if self._distillation is None:
            loss, parts = super().compute_loss(model, inputs), {}
        else:
            with self.accelerator.autocast():
                loss, parts = self._distillation(model, inputs)
        weight = self._weight(inputs.get("labels"), num_items_in_batch)
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value * weight * self.current_gradient_accumulation_steps)
        return (loss * weight, None) if return_outputs else loss * weight

    def _weight(self, labels: Tensor | None, count: Tensor | None) -> Tensor | float:
        """Of a mean over `labels`, `count` being those of the whole batch; gradients are averaged over processes later."""
        if labels is None or count is None:
            return 1 / self.current_gradient_accumulation_steps
        counted = labels[..., 1:] if getattr(self, "_loss_shifts_labels", False) else labels
        return (counted != IGNORED).sum() * self.accelerator.num_processes / count

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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Of numbers alone: a checkpoint of NaN would be resumed from for ever.

        Raises:
            UserError: training has diverged, or the disk is full.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        finite = torch.stack([_local(parameter.detach()).isfinite().all() for parameter in trained]).all()
        if not self.accelerator.gather(finite.to(self.args.device)[None]).all():
            self._refuse_divergence("weights that are not finite")
        with write_errors(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the means of the loss's parts since the last time, over all processes.

        Raises:
            UserError: the loss is no number.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            self._refuse_divergence(f"a loss of {logs['loss']}")
        names = sorted(self._parts)
        if names:
            means = torch.tensor([math.fsum(map(float, self._parts[name])) / len(self._parts[name]) for name in names])
            means = self.accelerator.gather(means.to(self.args.device)[None]).mean(0)
            logs = {**logs, **dict(zip(names, means.tolist(), strict=True))}
            self._parts.clear()
        super().log(logs, start_time)

    def _refuse_divergence(self, found: str) -> None:
        def refuse() -> None:
            raise UserError(
                f"step {self.state.global_step:,}: expected training to stay finite, got {found}; the last checkpoint from before stands, "
                "but that rate leads here again: choose a smaller --learning-rate or a longer --warmup"
            )

        on_all(refuse)


class MarkComplete(TrainerCallback):
    """Marks checkpoints that are whole, so that one cut off by a kill is never resumed from."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **rest: Any) -> None:
        PartialState().wait_for_everyone()  # each writes its own part
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for entry in directory.rglob("*"):
                flush(entry)
            (directory / COMPLETE_MARK).touch()
            flush(directory)


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    found: dict[int, Path] = {}
    for path in directory.glob("checkpoint-*"):
        if (path / COMPLETE_MARK).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None


class AlreadyTrained(Exception):
    """All steps are done already."""


class StopWhenTrained(TrainerCallback):
    """Ends a run that goes on from its last step: the Trainer would take one more."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyTrained


class ReportProgress(TrainerCallback):
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


def loss_curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Step, loss, its parts and the learning rate, from the Trainer's history."""
    names = ("step", "loss", "kl", "site_error", "learning_rate", "grad_norm")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry]


def _local(tensor: Tensor) -> Tensor:
    """This process's part of what is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
