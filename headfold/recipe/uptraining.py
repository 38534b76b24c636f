"""Train a folded checkpoint on, and write it again as an ordinary one."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.hub import resolve
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import JOB, commit, copy_side_files, disown, open_staging, refuse_overlap, write_json
from ..core.errors import UserError
from ..core.plan import Plan
from ..corpus.samples import kind_of
from ..evaluate.verify import TOLERANCE, model_output
from ..report.card import uptrained_card
from ..runtime.load import check, own_class
from ..stock import open_model, open_tokenizer, quiet, stored_dtype
from ..train import attentions as places
from ..train.distillation import SITE_WEIGHT, Distillation
from ..train.stream import Stream, together
from ..train.trainer import (
    OPTIMIZERS,
    SCHEDULES,
    Recipe,
    Say,
    Telling,
    Uptrainer,
    Whole,
    arguments,
    curve,
    last_whole,
    world_size,
)
from .measuring import MAX_CONTEXT, default_device
from .source import Progress, context_limit, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORK = ".headfold-work"
RECORD = "training.json"
"""Beside the weights: how the checkpoint was trained, and its learning curve."""
BATCH = 16
PUBLISHED = {"optimizer": "adafactor", "learning_rate": 1e-3, "schedule": "constant"}
"""2305.13245, 2.2: Adafactor with the pre-training's own schedule, which for T5 ends at a constant rate."""
DISTILLED = {"optimizer": "adamw", "learning_rate": 5e-4, "schedule": "linear"}
MAX_WARM_UP = 100
VERIFIED_ITEMS = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train, said in one of three ways."""

    steps: int | None
    tokens: int | None
    alpha: float | None
    pretraining_tokens: int | None

    def num_steps(self, tokens_per_step: int | None) -> int:
        """`tokens_per_step` is None where items have no common length.

        Raises:
            UserError: said twice, not at all, or in tokens of what has none.
        """
        ways = [self.steps is not None, self.tokens is not None, self.alpha is not None]
        if sum(ways) != 1 or (self.alpha is None) != (self.pretraining_tokens is None):
            raise UserError(
                "uptrain: expected one of --steps N, --tokens N, or --alpha SHARE with --pretraining-tokens N; give one"
            )
        if self.steps is not None:
            return self.steps
        if tokens_per_step is None:
            raise UserError(
                "uptrain: --tokens and --alpha count packed text, which this model does not take; give --steps"
            )
        total = self.tokens if self.tokens is not None else self.alpha * self.pretraining_tokens
        return max(1, math.ceil(total / tokens_per_step))


@dataclass(frozen=True, slots=True)
class UptrainResult:
    """What a run did, and where its checkpoint lies."""

    out: Path
    kind: str
    data: str
    teacher: str | None
    train: str
    recipe: Recipe
    num_trained: int
    """Parameters that were trained."""
    num_parameters: int
    resumed_at: int
    """Step at which this run went on; 0: from the beginning."""
    tokens: int
    """Seen in all, or items where they have no tokens."""
    tokens_per_second: float
    seconds: float
    curve: list[dict[str, float]]
    difference: float
    """Largest, of the written checkpoint's outputs from those of the trained model, and what it may be."""
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def uptrain(
    folded: str | Path,
    out: str | Path,
    *,
    distill: str | Path | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    alpha: float | None = None,
    pretraining_tokens: int | None = None,
    train: str = "attention",
    data: str | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    batch: int = BATCH,
    accumulate: int = 1,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    schedule: str | None = None,
    warmup: int | None = None,
    weight_decay: float = 0.0,
    site_weight: float = SITE_WEIGHT,
    bf16: bool | None = None,
    gradient_checkpointing: bool = False,
    save_every: int = 500,
    log_every: int = 10,
    tensorboard: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    callbacks: Sequence[Any] = (),
) -> UptrainResult:
    """Train the folded checkpoint `folded` and write it as `out`, a checkpoint of the same form.

    Without `distill` by the model's own loss, as 2305.13245 uptrains (Adafactor, a constant rate); with the original as `distill` by the
    KL to its outputs and the error of every attention (AdamW, a rate that falls to zero). `train` says what is trained:
    attention, all, or lora (low-rank updates of the attentions, merged at the end). `data` is any source of `headfold.corpus`
    that suits the model (default: what the fold was calibrated on), `batch`
    items of it a step. How long: `steps`, `tokens` of packed text, or a share
    `alpha` of the `pretraining_tokens`. Weights are trained in float32 (with `bf16` under autocast; default: on GPUs that have it) and
    written in the dtype of `folded`.

    The same call after a kill goes on from the last whole checkpoint in `OUT.partial`; `resume` insists that there is one.
    `callbacks` are further ones of the Trainer's.

    Raises:
        UserError: no fold, no plan beside it, data or a teacher that do not suit it, options that exclude each other.
    """
    folded, out = resolve(str(folded)), Path(out)
    config = _checked(folded)
    kind, plan = kind_of(config), Plan.load(folded / "plan.json")
    for place in (folded, *([resolve(str(distill))] if distill else [])):
        refuse_overlap(place, out)
    length = context or min(context_limit(config) or MAX_CONTEXT, MAX_CONTEXT)
    recipe = _recipe(
        PUBLISHED if distill is None else DISTILLED, batch, accumulate, weight_decay, bool(bf16), gradient_checkpointing,
        save_every, log_every, seed, learning_rate=learning_rate, optimizer=optimizer, schedule=schedule, warmup=warmup,
        steps=Budget(steps, tokens, alpha, pretraining_tokens).num_steps(batch * length if kind == "text" else None),
    )  # fmt: skip
    device = device or default_device()
    recipe = replace(
        recipe, bf16=device.startswith("cuda") and torch.cuda.is_bf16_supported() if bf16 is None else bf16
    )
    source = _data(data, plan)
    settings = {
        "version": version("headfold"), "folded": Checkpoint.open(folded).fingerprint(), "teacher": distill and str(distill),
        "data": source, "columns": list(columns), "context": length, "train": train, "site_weight": site_weight, **asdict(recipe),
    }  # fmt: skip
    run = _Run(folded, out, config, kind, plan, settings, recipe, device, progress or silent, say or _silent)
    return run.carry_out(distill, train, source, columns, length, site_weight, tensorboard, resume, force, callbacks)


def _silent(line: str) -> None:
    del line


def _checked(folded: Path) -> dict[str, Any]:
    config = check(folded)
    if not (folded / "plan.json").is_file():
        raise UserError(f"{folded}: expected what headfold fold wrote, found no plan.json there; fold the model first")
    return config


def _data(asked: str | None, plan: Plan) -> str:
    source = asked or plan.calibration.get("source", "self")
    if source == "self":
        raise UserError(
            "uptrain: expected data to train on, the fold was calibrated on none that could serve; give --data SOURCE"
        )
    return source


def _recipe(
    defaults: Mapping[str, Any],
    batch: int,
    accumulate: int,
    weight_decay: float,
    bf16: bool,
    gradient_checkpointing: bool,
    save_every: int,
    log_every: int,
    seed: int,
    *,
    steps: int,
    **asked: Any,
) -> Recipe:
    chosen = {**defaults, "warmup": min(MAX_WARM_UP, steps // 20), **{k: v for k, v in asked.items() if v is not None}}
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if chosen[name] not in known:
            raise UserError(f"--{name} {chosen[name]}: expected one of {', '.join(known)}")
    parts = world_size() * accumulate
    if batch % parts:
        raise UserError(
            f"--batch {batch}: expected a multiple of {parts} ({world_size()} processes, {accumulate} parts); choose one"
        )
    return Recipe(
        steps, batch, **chosen, accumulate=accumulate, weight_decay=weight_decay, bf16=bf16,
        gradient_checkpointing=gradient_checkpointing, save_every=save_every, log_every=log_every, seed=seed,
    )  # fmt: skip


@dataclass(slots=True)
class _Run:
    """One run in its staging directory."""

    folded: Path
    out: Path
    config: Mapping[str, Any]
    kind: str
    plan: Plan
    settings: Mapping[str, Any]
    recipe: Recipe
    device: str
    progress: Progress
    say: Say

    def carry_out(
        self,
        distill: str | Path | None,
        train: str,
        source: str,
        columns: Sequence[str],
        length: int,
        site_weight: float,
        tensorboard: str | Path | None,
        resume: bool,
        force: bool,
        callbacks: Sequence[Any],
    ) -> UptrainResult:
        # All that can be refused is, before anything stands on disk.
        tokenizer = open_tokenizer(self.folded) if self.kind == "text" else None
        stream = Stream(self.kind, source, self.folded, tokenizer, length, self.recipe.seed, columns)
        first = next(iter(stream))
        model = self._open(self.folded, self.config)
        dtype = stored_dtype(self.folded)
        outputs = [attention.output for attention in places.attentions(model)]
        distillation = None
        if distill is not None:
            directory = resolve(str(distill))
            teacher = self._open(directory, json.loads((directory / "config.json").read_text()))
            distillation = Distillation(teacher, model, outputs, site_weight)
        elif self.kind in ("sentences", "images") and "labels" not in first:
            raise UserError(
                f"{source}: expected labels to train on, found none; name their column, or give --distill ORIGINAL"
            )
        model = places.prepared(model, train)  # type: ignore[arg-type]
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode()).hexdigest()
        staging = open_staging(self.out, key, force)
        work = staging / _WORK
        last = last_whole(work) if work.is_dir() else None
        if resume and last is None:
            _empty(staging)
            raise UserError(
                f"{self.out}: expected an unfinished run of these settings to go on with, found none; leave --resume out"
            )
        logs = None if tensorboard is None else Path(tensorboard)
        trainer, seconds, begun = self._train(model, distillation, stream, work, last, logs, callbacks, first)
        counts = [
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(p.numel() for p in model.parameters()),
        ]
        if distillation is not None:
            distillation.close()
        trained = places.merged(trainer.accelerator.unwrap_model(trainer.model_wrapped)).to("cpu")
        items = [item for _, item in zip(range(VERIFIED_ITEMS), iter(stream), strict=False)]
        difference, tolerance = self._write(trained, staging, dtype, together(items))
        per_step = self.recipe.batch * _tokens(first)
        result = UptrainResult(
            self.out, self.kind, source, None if distill is None else str(distill), train, self.recipe, *counts, begun,
            self.recipe.steps * per_step, (self.recipe.steps - begun) * per_step / max(seconds, 1e-9), round(seconds, 3),
            curve(trainer.state.log_history), difference, tolerance,
        )  # fmt: skip
        self._finish(staging, result, force)
        return result

    def _open(self, directory: Path, config: Mapping[str, Any]) -> "PreTrainedModel":
        dtype = torch.promote_types(stored_dtype(directory), torch.float32)
        return open_model(directory, dtype=dtype, device=self.device, model_class=own_class(config))

    def _train(
        self,
        model: Any,
        distillation: Distillation | None,
        stream: Stream,
        work: Path,
        last: Path | None,
        logs: Path | None,
        callbacks: Sequence[Any],
        first: Mapping[str, Any],
    ) -> tuple[Uptrainer, float, int]:
        """The Trainer after its last step, seconds, and the step it went on from."""
        tokens = _tokens(first) * self.recipe.batch
        telling = Telling(lambda done, total: self.progress("uptrain", done, total), self.say, tokens, _unit(self.kind))
        if logs is not None:
            _tensorboard(logs)
        trainer = Uptrainer(
            model=model,
            args=arguments(self.recipe, work, self.device, logs, world_size()),
            train_dataset=stream,
            data_collator=together,
            callbacks=[Whole(), telling, *callbacks],
            distillation=distillation,
        )
        begun = 0 if last is None else int(last.name.rpartition("-")[2])
        started = time.monotonic()
        with quiet():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        return trainer, time.monotonic() - started, begun

    def _write(
        self, trained: "PreTrainedModel", staging: Path, dtype: torch.dtype, sample: Mapping[str, torch.Tensor]
    ) -> tuple[float, float]:
        """Weights in the fold's dtype, everything else as it is in the fold; then what the written checkpoint says, compared.

        Raises:
            UserError: it says something else than the trained model; nothing is put in place.
        """
        for (
            parameter
        ) in trained.eval().parameters():  # tables of frequencies, which are no parameters, keep their precision
            parameter.data = parameter.data.to(dtype).to(torch.promote_types(dtype, torch.float32))
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in trained.state_dict().items()}
        with quiet():
            trained.save_pretrained(staging, state_dict=state)
        copy_side_files(self.folded, staging)
        for name in ("config.json", "plan.json"):
            write_json(staging / name, json.loads((self.folded / name).read_text()))
        wide = torch.promote_types(dtype, torch.float32)
        expected = _says(trained.to(wide), sample)
        found = _says(open_model(staging, dtype=wide, device="cpu", model_class=own_class(self.config)), sample)
        difference = (found - expected).abs().max().item()
        tolerance = TOLERANCE[wide] * expected.double().square().mean().sqrt().item()
        if not difference <= tolerance:
            disown(staging)
            raise UserError(
                f"{staging}: expected what the trained model says within {tolerance:.2g}, got a difference of {difference:.2g}; "
                "not renamed. Did training diverge? Try a smaller --learning-rate"
            )
        return difference, tolerance

    def _finish(self, staging: Path, result: UptrainResult, force: bool) -> None:
        """The record, the card, then the rename."""
        import shutil

        record = {**self.settings, "resumed_at": result.resumed_at, "tokens": result.tokens, "curve": result.curve}
        write_json(staging / RECORD, record)
        card = self.folded / "README.md"
        text = card.read_text() if card.is_file() else ""
        (staging / "README.md").write_text(uptrained_card(text, self.folded.name, self._facts(result)))
        shutil.rmtree(staging / _WORK)
        commit(staging, self.out, force)

    def _facts(self, result: UptrainResult) -> dict[str, Any]:
        recipe, losses = result.recipe, [entry["loss"] for entry in result.curve]
        teacher = None if result.teacher is None else Path(result.teacher).name
        return {
            "data": Path(result.data).name if Path(result.data).exists() else result.data,
            "objective": "the model's own loss"
            if teacher is None
            else f"KL to `{teacher}` and the error of every attention",
            "trained": f"{result.train}, {result.num_trained:,} of {result.num_parameters:,} parameters",
            "steps": f"{recipe.steps:,} of {recipe.batch} items, {result.tokens:,} {_unit(result.kind)} in all",
            "optimizer": f"{recipe.optimizer}, rate {recipe.learning_rate:g}, {recipe.schedule}, warm-up {recipe.warmup} steps",
            "loss": f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" if losses else "not recorded",
        }


def _empty(staging: Path) -> None:
    """Remove a staging directory in which there is nothing yet."""
    if [path.name for path in staging.iterdir()] == [JOB]:
        (staging / JOB).unlink()
        staging.rmdir()


def _tokens(item: Mapping[str, torch.Tensor]) -> int:
    """Of one item as it is first read; 1 where it has none."""
    return len(item["input_ids"]) if "input_ids" in item and "attention_mask" not in item else 1


def _unit(kind: str) -> str:
    return "tokens" if kind == "text" else "items"


def _tensorboard(logs: Path) -> None:
    import importlib.util
    import os

    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs the package tensorboard; pip install headfold[train]")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)


@torch.no_grad()
def _says(model: "PreTrainedModel", sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model_output(model, dict(sample))[1].cpu()
