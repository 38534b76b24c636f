"""One uptraining in its staging directory: the models it opens, the checkpoint it resumes from, the checkpoint it leaves."""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.cards import read_card, write_card
from ..checkpoint.config import read_config
from ..checkpoint.disk import write_errors
from ..checkpoint.staging import commit, copy_side_files, is_of_job, job_key, staging_of, write_json, wrong_output
from ..conversion.calibration_config import DEFAULT_TOKENS, CalibrationRequest
from ..conversion.source import open_source
from ..core.errors import UserError
from ..core.json_input import read_object
from ..core.plan import Plan
from ..divergence import difference_and_tolerance
from ..evaluate.verify import compared_output
from ..families.wrapped import is_wrapper, seen_tokens
from ..hf_models import open_model, open_tokenizer, quiet, stored_dtype
from ..hf_models.building import open_config
from ..outputs import staged
from ..parallel import is_main, on_main
from ..reports.card import uptrained_card
from ..runtime.load import own_class
from ..train import sites as places
from ..train import wgqa
from ..train.distillation import Distillation
from ..train.sharding import gathered, load_everywhere
from ..train.stream import IN_TEXT, Item, Stream, collate
from ..train.trainer import TrainingConfig, Uptrainer, last_complete_checkpoint
from .config import UptrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORK = ".headfold-work"
RECORD = "training.json"
"""File beside the weights: how the checkpoint was trained, and its learning curve."""
VERIFIED_ITEMS = 4


@dataclass(frozen=True, slots=True)
class UptrainResult:
    """The result of an uptraining: its settings, its learning curve, and where its checkpoint lies."""

    out: Path
    kind: str
    data: str
    teacher: str | None
    train: str
    training: TrainingConfig
    num_trained: int
    """Parameters that were trained."""
    num_parameters: int
    resumed_at: int
    """Step at which this run resumed; 0 for the beginning."""
    tokens: int
    """Tokens seen in all, or items where they have no tokens."""
    tokens_per_second: float
    seconds: float
    curve: list[dict[str, float]]
    difference: float
    """Largest difference between the outputs of the written checkpoint and of the trained model; `tolerance` is what it may be."""
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The arguments of a trainer. `first` is the first item of the stream, `dtype` the one to write in."""

    stream: Stream
    first: Item
    model: Any
    distillation: Distillation | None
    dtype: torch.dtype

    @property
    def tokens_per_item(self) -> int:
        """Tokens of an item as it is first read; 1 where it has none of its own."""
        return len(self.first["input_ids"]) if self.stream.kind == "text" else 1

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """Parameters that are trained, and all of them."""
        every = list(self.model.parameters())
        return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


@dataclass(frozen=True, slots=True)
class Uptraining:
    """One uptraining. All processes train; rank 0 writes."""

    folded: Path
    out: Path
    config: Mapping[str, Any]
    kind: str
    plan: Plan
    request: UptrainConfig
    training: TrainingConfig
    settings: Mapping[str, Any]
    device: str

    @property
    def staging(self) -> Path:
        return staging_of(self.out)

    @property
    def work(self) -> Path:
        """The directory of the trainer's checkpoints; removed before the output is renamed."""
        return self.staging / _WORK

    @property
    def unit(self) -> str:
        """The unit of progress and results: tokens or items."""
        return "tokens" if self.kind == "text" else "items"

    @property
    def passes_tower(self) -> bool:
        """Whether the data pass the tower of a wrapper."""
        return self.kind in IN_TEXT

    def prepare(self) -> Prepared:
        """Open the data and the models, and run one item through them: whatever does not fit together fails here.

        Raises:
            UserError: a model or data that does not open, or that the model cannot be trained on.
        """
        load_everywhere()
        writer = self._teacher() if self.request.data == "self" else None
        stream = self._stream(writer)
        first = next(iter(stream))
        model = self._open(self.folded, self.config)
        teacher = writer or self._teacher()
        distillation = None if teacher is None else self._distillation(teacher, model)
        if distillation is None and self.kind in ("sentences", "images") and "labels" not in first:
            raise UserError(
                f"{self.request.data}: expected labels to train on, found none; name their column, or give --distill ORIGINAL"
            )
        model = self._with_trained_parameters(model)
        self._try_one_item(model, distillation, first)
        if self.request.tensorboard is not None:
            _use_tensorboard(self.request.tensorboard)
        return Prepared(stream, first, model, distillation, stored_dtype(self.folded))

    @torch.no_grad()
    def _try_one_item(self, model: Any, distillation: Distillation | None, first: Item) -> None:
        batch = {name: tensor.to(self.device) for name, tensor in collate([first]).items()}
        cast = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.training.bf16)
        try:
            with cast:
                answer = model(**batch) if distillation is None else distillation(model, batch)
            if distillation is None and "loss" not in answer:
                raise UserError(
                    f"{self.folded.name}: expected a model with a loss of its own, got {self.config.get('architectures')}, which has "
                    "none; give --distill ORIGINAL"
                )
        except (ValueError, TypeError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{self.request.data}: {self.folded.name} cannot be trained on this: {reason}") from error

    def _stream(self, writer: "PreTrainedModel | None") -> Stream:
        tokenizer = open_tokenizer(self.folded) if self.kind == "text" else None
        request, calibration = self.request, CalibrationRequest.recorded(self.plan.calibration)
        where = f"{self.folded}/config.json"
        return Stream(
            self.kind,
            request.data,
            self.folded,
            tokenizer,
            request.context,
            self.training.seed,
            request.columns,
            writer=writer,
            written_tokens=(calibration and calibration.tokens) or DEFAULT_TOKENS,
            seen=seen_tokens(open_config(self.config, where).to_dict()) if is_wrapper(self.config) else None,
        )

    def _open(self, directory: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """Open a model, by default in float32 at least: half precision loses small steps."""
        dtype = dtype or torch.promote_types(stored_dtype(directory), torch.float32)
        return open_model(directory, dtype=dtype, device=self.device, model_class=own_class(dict(config), directory))

    def _teacher(self) -> "PreTrainedModel | None":
        place = self.request.teacher
        if place is None:
            return None
        dtype = stored_dtype(place) if self.training.bf16 else None  # the teacher takes no steps
        return self._open(place, read_config(place), dtype)

    def _distillation(self, teacher: "PreTrainedModel", model: "PreTrainedModel") -> Distillation:
        outputs = [site.output for site in places.find_sites(model, towers=self.passes_tower)]
        theirs = self._outputs_of(teacher, outputs)
        return Distillation(teacher, model, outputs, self.request.site_weight, teacher_outputs=theirs)

    def _outputs_of(self, teacher: "PreTrainedModel", outputs: Sequence[str]) -> Sequence[str]:
        """Return the teacher's output projections in the order of `outputs`; they differ where a fold has another class (GPT-J as Phi)."""
        place = self.request.teacher
        assert place is not None
        source = None if {*outputs} <= dict(teacher.named_modules()).keys() else open_source(place)
        if source is None or source.checkpoint.fingerprint() != self.plan.source:
            return outputs
        return [site.paths["o"] for site in source.every_site if site.name in self.plan.sites]

    def _with_trained_parameters(self, model: "PreTrainedModel") -> Any:
        """Return the model with the parameters that train, parametrized as requested."""
        request = self.request
        if request.train != "lora":
            places.set_trainable(model, request.train, towers=self.passes_tower)  # type: ignore[arg-type]
        if request.wgqa is not None:
            assert request.original is not None
            source = open_source(request.original)
            if source.checkpoint.fingerprint() != self.plan.source:
                raise UserError(
                    f"--original {request.original}: expected the model that {self.folded.name} was folded from, got another"
                )
            wgqa.attach(
                model, source.every_site, self.plan, source.checkpoint.read, request.wgqa, seed=self.training.seed
            )
        return places.set_trainable(model, "lora", towers=self.passes_tower) if request.train == "lora" else model

    @contextmanager
    def opened(self, resume: bool, force: bool) -> Iterator[None]:
        """Own `OUT.partial`; with `resume` only where a whole checkpoint of these settings lies there.

        Raises:
            UserError: something else is in the way, another run writes there, or there is nothing to resume.
        """
        key = job_key(self.settings)
        none = f"{self.out}: expected an unfinished run of these settings to resume, found none; leave --resume out"
        if resume and on_main(
            lambda: not is_of_job(self.out, key)
        ):  # before what lies there is taken for another job's
            raise UserError(none)
        with staged(self.out, key, force):
            if resume and on_main(lambda: self._last_checkpoint() is None):
                raise UserError(none)
            yield

    def _last_checkpoint(self) -> Path | None:
        return last_complete_checkpoint(self.work) if self.work.is_dir() else None

    def last_checkpoint(self) -> Path | None:
        """Return the whole checkpoint to resume from, as every process sees it.

        Raises:
            UserError: the processes do not share a file system.
        """
        found = on_main(self._last_checkpoint)  # one process removes what is incomplete
        if not self.staging.is_dir():
            raise UserError(
                f"{self.staging}: expected the directory that rank 0 opened, found none; all processes need OUT on one file system"
            )
        return found

    def trained_model(self, trainer: Uptrainer, distillation: Distillation | None) -> Any:
        """Return the trained model, whole, on rank 0; None elsewhere."""
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        state = gathered(model) if trainer.is_fsdp_enabled else None
        if distillation is not None:
            distillation.close()
        if not is_main():
            return None
        if state is not None:
            model = self._with_trained_parameters(self._open(self.folded, self.config))
            model.load_state_dict(state)
        return model

    def write(self, model: Any, dtype: torch.dtype, stream: Stream) -> tuple[float, float]:
        """Write the trained weights in the fold's dtype and everything else as it is in the fold; compare what was written.

        Returns the largest difference of outputs and its tolerance.

        Raises:
            UserError: they differ by more; nothing is put in place.
        """
        if wgqa.attached(model):
            wgqa.fold_away(model)
        trained: Any = places.merge_adapters(model)
        trained = trained.to("cpu")
        staging, wide = self.staging, torch.promote_types(dtype, torch.float32)
        trained.eval()
        for parameter in trained.parameters():  # buffers, such as RoPE frequencies, keep their precision
            parameter.data = parameter.data.to(dtype).to(wide)
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in trained.state_dict().items()}
        with quiet(), write_errors(staging):
            trained.save_pretrained(staging, state_dict=state)
        copy_side_files(self.folded, staging)
        for name in ("config.json", "plan.json"):
            write_json(staging / name, read_object(self.folded / name))
        sample = collate(list(islice(stream, VERIFIED_ITEMS)))
        expected = compared_output(trained, sample)
        opened = open_model(staging, dtype=wide, device="cpu", model_class=own_class(dict(self.config)))
        difference, tolerance = difference_and_tolerance(compared_output(opened, sample), expected, wide)
        if not difference <= tolerance:
            raise wrong_output(
                staging,
                f"expected the outputs of the trained model within {tolerance:.2g}, got a difference of {difference:.2g}",
                ". Did training diverge? Try a smaller --learning-rate",
            )
        return difference, tolerance

    def finish(self, result: UptrainResult, force: bool) -> None:
        """Write the record and the card, then rename the output into its place."""
        record = {**self.settings, "resumed_at": result.resumed_at, "tokens": result.tokens, "curve": result.curve}
        for name in ("teacher", "original", "data"):  # a record goes where the weights go
            record[name] = Path(record[name]).name if record[name] and Path(record[name]).exists() else record[name]
        write_json(self.staging / RECORD, record)
        write_card(self.staging, uptrained_card(read_card(self.folded), self.folded.name, self._card_facts(result)))
        shutil.rmtree(self.work)
        commit(self.staging, self.out, force)

    def _card_facts(self, result: UptrainResult) -> dict[str, str]:
        request, training, losses = self.request, self.training, [entry["loss"] for entry in result.curve]
        distilled = request.teacher and f"KL to `{request.teacher.name}` and the error of every site"
        weighted = "" if request.wgqa is None else f", K and V as {request.wgqa}"
        return {
            "data": Path(result.data).name if Path(result.data).exists() else result.data,
            "objective": distilled or "the model's own loss",
            "trained": f"{result.train}{weighted}, {result.num_trained:,} of {result.num_parameters:,} parameters",
            "steps": f"{training.steps:,} of {training.batch} items, {result.tokens:,} {self.unit} in all",
            "optimizer": f"{training.optimizer}, rate {training.learning_rate:g}, {training.schedule}, warm-up {training.warmup} steps",
            "loss": f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" if losses else "not recorded",
        }


@contextmanager
def memory_errors() -> Iterator[None]:
    """Report a device that runs out of memory as a `UserError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "uptrain: the device's memory is too small for a part of a batch; give --accumulate N or --gradient-checkpointing"
        ) from error


def _use_tensorboard(logs: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs the package tensorboard; pip install headfold[train]")
    if logs.exists() and not logs.is_dir():
        raise UserError(f"--tensorboard {logs}: expected a directory or nothing, got a file; choose another")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
