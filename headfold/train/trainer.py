"""A transformers Trainer for folded models: its objective, checkpoints that are complete or ignored, and progress reports."""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..checkpoint.disk import flush, write_errors
from ..checkpoint.staging import write_json
from ..core.errors import UserError
from ..core.json_input import read_object
from ..corpus.pairs import IGNORED
from ..parallel import on_all
from .distillation import Distillation

COMPLETE_MARK = "headfold-whole"
"""File in a Trainer's checkpoint that is created once everything else is on disk."""
KEPT = 2
"""Number of checkpoints kept: the last complete one stays while another is written."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The hyperparameters of a run; all of them are written to the run's record."""

    steps: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup: int
    """Steps over which the learning rate rises from 0."""
    batch: int = 16
    """Items of one step, over all processes."""
    accumulate: int = 1
    """Number of parts that each process divides its share of a batch into."""
    weight_decay: float = 0.0
    bf16: bool = False
    """Autocast to bfloat16; weights and optimizer remain float32."""
    gradient_checkpointing: bool = False
    save_every: int = 500
    log_every: int = 10
    seed: int = 0


OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def training_arguments(
    training: TrainingConfig, directory: Path, device: str, logs: Path | None, world_size: int
) -> TrainingArguments:
    """Return the Trainer's arguments. The batch is divided among processes and accumulation parts."""
    share, rest = divmod(training.batch, world_size * training.accumulate)
    assert share and not rest
    on_gpu = device.startswith("cuda")
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=training.steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=training.accumulate,
        optim=OPTIMIZERS[training.optimizer],
        learning_rate=training.learning_rate,
        lr_scheduler_type=SCHEDULES[training.schedule],
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        bf16=training.bf16,
        **(_checkpointing() if training.gradient_checkpointing else {}),
        save_steps=training.save_every,
        save_total_limit=KEPT,
        logging_steps=training.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[] if logs is None else ["tensorboard"],
        seed=training.seed,
        data_seed=training.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        # Every process reads for itself: accelerate's other way, one that reads for all, cannot join batches padded to different lengths.
        accelerator_config={"dispatch_batches": False},
    )
    # A process has one GPU. The Trainer would copy the model to all it sees, for a batch of each, and hooks do not survive that.
    _ = arguments.device  # which counts them
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _checkpointing() -> dict[str, Any]:
    """Return the arguments for gradient checkpointing, under the name that this version of transformers knows."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class Uptrainer(Trainer):
    """Trains with the model's own loss or, where a `distillation` is given, with that."""

    def __init__(self, *, distillation: Distillation | None = None, **how: Any) -> None:
        super().__init__(**how)
        self._distillation = distillation
        self._parts: dict[str, list[Tensor]] = {}
        self._remove_printing()
        self.model_accepts_loss_kwargs = True  # so that labels are counted over all parts and processes
        self.loss_is_scaled_for_ga = True

    def _remove_printing(self) -> None:
        """Remove the Trainer's callback that prints to stdout, which is for results."""
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **rest: Any) -> Any:
        """Train, from the state of a checkpoint where one is named.

        Raises:
            UserError: the checkpoint is broken.
        """
        if resume_from_checkpoint is not None:
            state = Path(resume_from_checkpoint) / "trainer_state.json"
            with _broken(resume_from_checkpoint):
                read_object(state)  # no pipe, which would block whoever opens it
                _check_intervals(TrainerState.load_from_json(str(state)))
        return super().train(resume_from_checkpoint, *arguments, **rest)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _broken(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _broken(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _broken(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one part of a batch, weighted so that parts and processes add up to the mean over all labels of the batch.

        The count of labels is not passed to the model: some models (T5) accept it and ignore it.
        """
        if self._distillation is None:
            loss: Any = super().compute_loss(model, inputs)
            parts: dict[str, Tensor] = {}
        else:
            with self.accelerator.autocast():
                loss, parts = self._distillation(model, inputs)
        weight = self._weight(inputs.get("labels"), num_items_in_batch)
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value * weight * self.current_gradient_accumulation_steps)
        return (loss * weight, None) if return_outputs else loss * weight

    def _weight(self, labels: Tensor | None, count: Tensor | None) -> Tensor | float:
        """Return the weight of a mean over `labels`, where `count` is the number of labels in the batch; gradients are averaged over
        processes later.
        """
        if labels is None or count is None:
            return 1 / self.current_gradient_accumulation_steps
        counted = labels[..., 1:] if getattr(self, "_loss_shifts_labels", False) else labels
        return (counted != IGNORED).sum() * self.accelerator.num_processes / count

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save weights under their names in memory, by which the Trainer resumes; it silently skips all others, and a ViT has others
        on disk.
        """
        model = self.model
        if not isinstance(model, PreTrainedModel):
            return super()._save(output_dir, state_dict)
        vars(model)["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del vars(model)["save_pretrained"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint if all weights are finite; otherwise every resumed run would start from NaN.

        Raises:
            UserError: training has diverged, or the disk is full.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        finite = torch.stack([_local(parameter.detach()).isfinite().all() for parameter in trained]).all()
        if not self.accelerator.gather(finite.to(self.args.device)[None]).all():
            self._refuse_divergence("weights that are not finite")
        with write_errors(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the loss's parts since the last log, over all processes.

        Raises:
            UserError: the loss is not finite.
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
                f"step {self.state.global_step:,}: expected training to stay finite, got {found}; the checkpoint from before is kept, "
                "but training would diverge again: choose a smaller --learning-rate or a longer --warmup"
            )

        on_all(refuse)


@contextmanager
def _broken(checkpoint: str | None) -> Iterator[None]:
    """Report files of a checkpoint that cannot be read, and pickles of more than tensors, which torch refuses to open."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # corrupt files fail in more ways than libraries have types for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{checkpoint}: expected a whole checkpoint to resume from, got a broken one ({reason}); remove it to go on from an earlier one"
        ) from error


def _check_intervals(state: TrainerState) -> None:
    """Check the numbers of steps after which the Trainer does something: it divides by them.

    Raises:
        ValueError: one is no positive whole number.
    """
    for name in ("logging_steps", "eval_steps", "save_steps"):
        steps = getattr(state, name)
        if type(steps) is not int or steps < 1:
            raise ValueError(f"trainer_state.json: {name}: expected a positive whole number, got {steps!r:.60}")


class MarkComplete(TrainerCallback):
    """Marks checkpoints that are complete, so that a run never resumes from one that was interrupted while it was written."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **rest: Any) -> None:
        PartialState().wait_for_everyone()  # each writes its own part
        if state.is_world_process_zero:
            directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for entry in directory.rglob("*"):
                flush(entry)
            write_json(directory / COMPLETE_MARK, _digests(directory))
            flush(directory)


def last_complete_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, and delete incomplete ones.

    Raises:
        UserError: its files are no more as they were written.
    """
    found: dict[int, Path] = {}
    for path in directory.glob("checkpoint-[0-9]*"):
        if (path / COMPLETE_MARK).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    if not found:
        return None
    newest = found[max(found)]
    _check_contents(newest)
    return newest


def _digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != COMPLETE_MARK:
            with path.open("rb") as file:
                found[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _check_contents(directory: Path) -> None:
    """Refuse a checkpoint whose files have changed since: training would go on from another state, and nobody would see it."""
    mark = directory / COMPLETE_MARK
    if not mark.stat().st_size:  # an earlier version wrote it
        return
    written, there = read_object(mark), _digests(directory)
    if changed := sorted(name for name in {*written, *there} if written.get(name) != there.get(name)):
        raise UserError(
            f"{directory}: expected the files that training wrote, got another {changed[0]}; remove it to go on from an earlier one"
        )


class AlreadyTrained(Exception):
    """Raised where a resumed run has done all its steps."""


class StopWhenTrained(TrainerCallback):
    """Ends a resumed run that has done all its steps; the Trainer would do one more."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyTrained


class ReportProgress(TrainerCallback):
    """Reports progress after every step, and prints a line with the loss whenever the Trainer logs."""

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
    """Return step, loss, its parts and the learning rate from the Trainer's history."""
    names = ("step", "loss", "kl", "site_error", "learning_rate", "grad_norm")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry]


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
