"""One training run in its staging directory, from the models it opens to the checkpoint it leaves."""

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.disk import write_errors
from ..checkpoint.staging import JOB, commit, copy_side_files, disown, job_key, open_staging, write_json
from ..core.errors import UserError
from ..core.plan import Plan
from ..evaluate.verify import compared_output, difference_and_tolerance
from ..hf_models import open_model, open_tokenizer, quiet, stored_dtype
from ..parallel import everyone, leads, processes, reaching_others
from ..report.card import uptrained_card
from ..runtime.load import own_class
from ..train import attentions as places
from ..train import wgqa
from ..train.distillation import Distillation
from ..train.stream import Item, Stream, collate
from ..train.trainer import (
    AlreadyTrained,
    MarkComplete,
    ReportProgress,
    Say,
    StopWhenTrained,
    TrainingConfig,
    Uptrainer,
    last_complete_checkpoint,
    loss_curve,
    training_arguments,
)
from .sharding import check_sharding, gathered, load_everywhere
from .source import Progress, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORK = ".headfold-work"
RECORD = "training.json"
"""Beside the weights: how the checkpoint was trained, and its learning curve."""
VERIFIED_ITEMS = 4


@dataclass(frozen=True, slots=True)
class UptrainConfig:
    """What is trained on what, and toward what; `TrainingConfig` says how."""

    train: str
    data: str
    columns: tuple[str, ...]
    context: int
    teacher: Path | None
    site_weight: float
    wgqa: str | None
    original: Path | None
    tensorboard: Path | None

    def to_json(self) -> dict[str, Any]:
        """What decides the result."""
        facts = {name: value for name, value in asdict(self).items() if name != "tensorboard"}
        return {name: str(value) if isinstance(value, Path) else value for name, value in facts.items()}


@dataclass(frozen=True, slots=True)
class UptrainResult:
    """What a run did, and where its checkpoint lies."""

    out: Path
    kind: str
    data: str
    teacher: str | None
    train: str
    recipe: TrainingConfig
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


@dataclass(slots=True)
class TrainingRun:
    """One run. Of several processes all train, and the first writes."""

    folded: Path
    out: Path
    config: Mapping[str, Any]
    kind: str
    plan: Plan
    settings: Mapping[str, Any]
    recipe: TrainingConfig
    device: str
    progress: Progress
    say: Say

    def carry_out(self, asked: UptrainConfig, *, resume: bool, force: bool, callbacks: Sequence[Any]) -> UptrainResult:
        """Open, train, write, verify, rename. All that can be refused is, before anything stands on disk."""
        ready = everyone(lambda: self._ready(asked))
        stream, first, model, distillation, dtype = ready
        everyone(lambda: self._open_staging(resume, force) if leads() else None)
        last = everyone(self._last)
        per_step = self.recipe.batch * _tokens(first)
        trainer = Uptrainer(
            model=model, args=training_arguments(self.recipe, self._work, self.device, asked.tensorboard, processes()), train_dataset=stream,
            data_collator=collate, callbacks=[MarkComplete(), StopWhenTrained(), self._telling(per_step), *callbacks], distillation=distillation,
        )  # fmt: skip
        everyone(lambda: self._check_sharding(trainer, last))
        counts = [
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(p.numel() for p in model.parameters()),
        ]
        started = time.monotonic()
        with quiet(), reaching_others(), _memory(), suppress(AlreadyTrained):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds, begun = time.monotonic() - started, 0 if last is None else int(last.name.rpartition("-")[2])
        trained = self._trained(trainer, distillation, asked)

        def finish() -> UptrainResult:
            compared = (0.0, 0.0) if trained is None else self._written(trained, dtype, stream)
            result = UptrainResult(
                self.out, self.kind, asked.data, asked.teacher and str(asked.teacher), asked.train, self.recipe, *counts, begun,
                self.recipe.steps * per_step, (self.recipe.steps - begun) * per_step / max(seconds, 1e-9), round(seconds, 3),
                loss_curve(trainer.state.log_history), *compared,
            )  # fmt: skip
            if trained is not None:
                self._finish(result, asked, force)
            return result

        return everyone(finish)

    def _ready(self, asked: UptrainConfig) -> tuple[Stream, Item, Any, Distillation | None, torch.dtype]:
        """The data and its first item, the model with what of it trains, its teacher; and the dtype to write in."""
        load_everywhere()
        stream = self._stream(asked)
        first = next(iter(stream))
        model = self._open(self.folded, self.config)
        distillation = self._distillation(asked, model, first)
        model = self._prepared(model, asked)
        self._try(model, distillation, first, asked)
        if asked.tensorboard is not None:
            _tensorboard(asked.tensorboard)
        return stream, first, model, distillation, stored_dtype(self.folded)

    @torch.no_grad()
    def _try(self, model: Any, distillation: Distillation | None, first: Item, asked: UptrainConfig) -> None:
        """One item, without a step: whatever model, teacher and data make of each other they make here."""
        batch = {name: tensor.to(self.device) for name, tensor in collate([first]).items()}
        cast = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.bf16)
        try:
            with cast:
                answer = model(**batch) if distillation is None else distillation(model, batch)
            if distillation is None and "loss" not in answer:
                raise UserError(
                    f"{self.folded.name}: expected a model with a loss of its own, {self.config.get('architectures')} has none; "
                    "give --distill ORIGINAL"
                )
        except (ValueError, TypeError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{asked.data}: {self.folded.name} cannot be trained on this: {str(error).strip().partition(chr(10))[0]}"
            ) from error

    @property
    def _staging(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial").absolute()

    @property
    def _work(self) -> Path:
        return self._staging / _WORK

    def _stream(self, asked: UptrainConfig) -> Stream:
        tokenizer = open_tokenizer(self.folded) if self.kind == "text" else None
        return Stream(self.kind, asked.data, self.folded, tokenizer, asked.context, self.recipe.seed, asked.columns)

    def _open(self, directory: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """By default in float32 at least, as small steps would drown in half precision."""
        dtype = dtype or torch.promote_types(stored_dtype(directory), torch.float32)
        return open_model(directory, dtype=dtype, device=self.device, model_class=own_class(config))

    def _distillation(self, asked: UptrainConfig, model: "PreTrainedModel", first: Item) -> Distillation | None:
        if asked.teacher is not None:
            outputs = [attention.output for attention in places.find_attentions(model)]
            dtype = stored_dtype(asked.teacher) if self.recipe.bf16 else None  # it takes no steps
            teacher = self._open(asked.teacher, json.loads((asked.teacher / "config.json").read_text()), dtype)
            return Distillation(
                teacher,
                model,
                outputs,
                asked.site_weight,
                teacher_outputs=self._outputs_of(teacher, outputs, asked.teacher),
            )
        if self.kind in ("sentences", "images") and "labels" not in first:
            raise UserError(
                f"{asked.data}: expected labels to train on, found none; name their column, or give --distill ORIGINAL"
            )
        return None

    def _outputs_of(self, teacher: "PreTrainedModel", outputs: Sequence[str], place: Path) -> Sequence[str]:
        """The teacher's output projections, in the order of `outputs`: the same, except where a fold came out as another class (GPT-NeoX
        and GPT-J as Phi)."""
        source = None if {*outputs} <= dict(teacher.named_modules()).keys() else open_source(place)
        if source is None or source.checkpoint.fingerprint() != self.plan.source:
            return outputs
        return [site.paths["o"] for site in source.every_site if site.name in self.plan.sites]

    def _prepared(self, model: "PreTrainedModel", asked: UptrainConfig) -> Any:
        """What trains, and how it is parametrized."""
        if asked.train != "lora":
            places.set_trainable(model, asked.train)  # type: ignore[arg-type]
        if asked.wgqa is not None:
            assert asked.original is not None
            source = open_source(asked.original)
            if source.checkpoint.fingerprint() != self.plan.source:
                raise UserError(
                    f"--original {asked.original}: expected the model that {self.folded.name} was folded from, got another"
                )
            wgqa.attach(model, source.every_site, self.plan, source.checkpoint.read, asked.wgqa, seed=self.recipe.seed)
        return places.set_trainable(model, "lora") if asked.train == "lora" else model

    def _open_staging(self, resume: bool, force: bool) -> None:
        """The staging directory, with whole checkpoints alone."""
        key = job_key(self.settings)
        open_staging(self.out, key, force)
        last = last_complete_checkpoint(self._work) if self._work.is_dir() else None
        if resume and last is None:
            _remove_empty(self._staging)
            raise UserError(
                f"{self.out}: expected an unfinished run of these settings to go on with, found none; leave --resume out"
            )

    def _last(self) -> Path | None:
        """The checkpoint to go on from, which all processes see."""
        if not self._staging.is_dir():
            raise UserError(
                f"{self._staging}: expected what the first process opened, found nothing; all need OUT on one file system"
            )
        return last_complete_checkpoint(self._work) if self._work.is_dir() else None

    def _check_sharding(self, trainer: Uptrainer, last: Path | None) -> None:
        try:
            check_sharding(trainer, self.recipe.optimizer, last)
        except UserError:
            if leads():
                _remove_empty(self._staging)
            raise

    def _telling(self, tokens_per_step: int) -> ReportProgress:
        return ReportProgress(
            lambda done, total: self.progress("uptrain", done, total), self.say, tokens_per_step, _unit(self.kind)
        )

    def _trained(self, trainer: Uptrainer, distillation: Distillation | None, asked: UptrainConfig) -> Any:
        """The trained model, whole, in the first process; None in the others."""
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        state = gathered(model) if trainer.is_fsdp_enabled else None
        if distillation is not None:
            distillation.close()
        if not leads():
            return None
        if state is not None:
            model = self._prepared(self._open(self.folded, self.config), asked)
            model.load_state_dict(state)
        return model

    def _written(self, model: Any, dtype: torch.dtype, stream: Stream) -> tuple[float, float]:
        """On disk, and compared there."""
        if wgqa.attached(model):
            wgqa.fold_away(model)
        trained = places.merge_adapters(model).to("cpu")
        return self._write(trained, dtype, collate(list(islice(stream, VERIFIED_ITEMS))))

    def _write(self, trained: "PreTrainedModel", dtype: torch.dtype, sample: Item) -> tuple[float, float]:
        """Weights in the fold's dtype, everything else as it is in the fold; then what the written checkpoint says, compared.

        Raises:
            UserError: it says something else than the trained model; nothing is put in place.
        """
        staging, wide = self._staging, torch.promote_types(dtype, torch.float32)
        for (
            parameter
        ) in trained.eval().parameters():  # tables of frequencies, which are no parameters, keep their precision
            parameter.data = parameter.data.to(dtype).to(wide)
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in trained.state_dict().items()}
        with quiet(), write_errors(staging):
            trained.save_pretrained(staging, state_dict=state)
        copy_side_files(self.folded, staging)
        for name in ("config.json", "plan.json"):
            write_json(staging / name, json.loads((self.folded / name).read_text()))
        expected = compared_output(trained, sample)
        found = compared_output(
            open_model(staging, dtype=wide, device="cpu", model_class=own_class(self.config)), sample
        )
        difference, tolerance = difference_and_tolerance(found, expected, wide)
        if not difference <= tolerance:
            disown(staging)
            raise UserError(
                f"{staging}: expected what the trained model says within {tolerance:.2g}, got a difference of {difference:.2g}; "
                "not renamed. Did training diverge? Try a smaller --learning-rate"
            )
        return difference, tolerance

    def _finish(self, result: UptrainResult, asked: UptrainConfig, force: bool) -> None:
        """The record, the card, then the rename."""
        record = {**self.settings, "resumed_at": result.resumed_at, "tokens": result.tokens, "curve": result.curve}
        for name in ("teacher", "original", "data"):  # a record goes where the weights go
            record[name] = Path(record[name]).name if record[name] and Path(record[name]).exists() else record[name]
        write_json(self._staging / RECORD, record)
        card = self.folded / "README.md"
        text = uptrained_card(card.read_text() if card.is_file() else "", self.folded.name, self._facts(result, asked))
        (self._staging / "README.md").write_text(text)
        shutil.rmtree(self._staging / _WORK)
        commit(self._staging, self.out, force)

    def _facts(self, result: UptrainResult, asked: UptrainConfig) -> dict[str, str]:
        recipe, losses = result.recipe, [entry["loss"] for entry in result.curve]
        learned = (
            "the model's own loss"
            if asked.teacher is None
            else f"KL to `{asked.teacher.name}` and the error of every attention"
        )
        weighed = "" if asked.wgqa is None else f", K and V as {asked.wgqa}"
        return {
            "data": Path(result.data).name if Path(result.data).exists() else result.data,
            "objective": learned,
            "trained": f"{result.train}{weighed}, {result.num_trained:,} of {result.num_parameters:,} parameters",
            "steps": f"{recipe.steps:,} of {recipe.batch} items, {result.tokens:,} {_unit(result.kind)} in all",
            "optimizer": f"{recipe.optimizer}, rate {recipe.learning_rate:g}, {recipe.schedule}, warm-up {recipe.warmup} steps",
            "loss": f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" if losses else "not recorded",
        }


@contextmanager
def _memory() -> Iterator[None]:
    """What a device says that has too little."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "uptrain: the device's memory is too small for a part of a batch; give --accumulate N or --gradient-checkpointing"
        ) from error


def _remove_empty(staging: Path) -> None:
    """A staging directory in which there is nothing yet."""
    if not any(path.is_file() and path.name != JOB for path in staging.rglob("*")):
        shutil.rmtree(staging)


def _tokens(item: Item) -> int:
    """Of one item as it is first read; 1 where it has none of its own."""
    return len(item["input_ids"]) if "input_ids" in item and "attention_mask" not in item else 1


def _unit(kind: str) -> str:
    return "tokens" if kind == "text" else "items"


def _tensorboard(logs: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs the package tensorboard; pip install headfold[train]")
    if logs.exists() and not logs.is_dir():
        raise UserError(f"--tensorboard {logs}: expected a directory or nothing, got a file; choose another")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
