"""The config of an uptraining, checked, with defaults filled in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.hub import resolve
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import refuse_overlap
from ..conversion.calibration_config import CalibrationRequest
from ..core.errors import UserError
from ..core.plan import Plan
from ..corpus.samples import MAX_CONTEXT, kind_of
from ..families.context import context_length
from ..parallel import num_processes
from ..runtime.load import read_checked_config
from ..train import wgqa as weighing
from ..train.sites import SCOPES
from ..train.trainer import OPTIMIZERS, SCHEDULES, TrainingConfig

PUBLISHED = {"optimizer": "adafactor", "learning_rate": 1e-3, "schedule": "constant"}
"""2305.13245, section 2.2: Adafactor with the schedule of pre-training, which for T5 ends at a constant rate."""
DISTILLED = {"optimizer": "adamw", "learning_rate": 5e-4, "schedule": "linear"}
MAX_WARM_UP = 100
DEFAULT_BATCH = next(field.default for field in fields(TrainingConfig) if field.name == "batch")


@dataclass(frozen=True, slots=True)
class UptrainConfig:
    """The trained parameters, their data and their objective; `TrainingConfig` holds the hyperparameters."""

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
        """Return the settings that decide the result."""
        facts = {name: value for name, value in asdict(self).items() if name != "tensorboard"}
        return {name: str(value) if isinstance(value, Path) else value for name, value in facts.items()}


@dataclass(frozen=True, slots=True)
class Length:
    """The length of a training, given in one of three ways."""

    steps: int | None
    tokens: int | None
    alpha: float | None
    pretraining_tokens: int | None

    def num_steps(self, tokens_per_step: int | None) -> int:
        """Return the number of steps; `tokens_per_step` is None where items have no common length.

        Raises:
            UserError: no length or several, or one in tokens for a model that does not take packed text.
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
        if self.tokens is not None:
            return math.ceil(self.tokens / tokens_per_step)
        assert self.alpha is not None and self.pretraining_tokens is not None
        return math.ceil(_positive("--alpha", self.alpha) * self.pretraining_tokens / tokens_per_step)


def check_folded(folded: Path) -> dict[str, Any]:
    """Return the config of a fold.

    Raises:
        UserError: no checkpoint, or one without a plan.
    """
    config = read_checked_config(folded)
    if not (folded / "plan.json").is_file():
        raise UserError(f"{folded}: expected what headfold fold wrote, found no plan.json there; fold the model first")
    return config


def kind_and_columns(
    config: Mapping[str, Any], plan: Plan, data: str | None, columns: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Return the kind of data to train on, and the columns of a table: those named or, of the data of the calibration, those recorded.

    Raises:
        UserError: the plan records something else than calibration data.
    """
    recorded = CalibrationRequest.recorded(plan.calibration) if data is None and not columns else None
    named = tuple(columns) if recorded is None else recorded.columns
    return kind_of(config, named), named


def resolve_uptrain(
    folded: Path,
    out: Path,
    config: Mapping[str, Any],
    plan: Plan,
    *,
    distill: str | Path | None,
    original: str | Path | None,
    train: str,
    wgqa: str | None,
    data: str | None,
    columns: Sequence[str],
    context: int | None,
    site_weight: float,
    tensorboard: str | Path | None,
) -> UptrainConfig:
    """Check the options of an uptraining against the fold and fill in the defaults.

    Raises:
        UserError: an option that does not suit the fold, or options that exclude each other.
    """
    teacher, source_of_heads = (None if p is None else resolve(str(p)) for p in (distill, original or distill))
    for other in filter(None, (folded, teacher, source_of_heads)):
        refuse_overlap(other, out)
    if teacher is not None and Checkpoint.open(teacher).fingerprint() == Checkpoint.open(folded).fingerprint():
        raise UserError(
            f"--distill {distill}: expected the original of the fold, got the fold itself; name the original"
        )
    return UptrainConfig(
        train=_one_of("--train", train, SCOPES),
        data=_data(data, plan, distills=teacher is not None),
        columns=tuple(columns),
        context=_context(context, config),
        teacher=teacher,
        site_weight=_positive("--site-weight", site_weight, least=0),
        wgqa=_wgqa(wgqa, train, source_of_heads),
        original=source_of_heads,
        tensorboard=None if tensorboard is None else Path(tensorboard),
    )


def resolve_training(
    distills: bool, length: Length, tokens_per_item: int | None, device: str, given: Mapping[str, Any]
) -> TrainingConfig:
    """Return the hyperparameters with the defaults of their kind of training, and a batch that the processes can divide.

    Raises:
        UserError: a value out of range.
    """
    options = {name: value for name, value in given.items() if value is not None}
    unknown = options.keys() - {field.name for field in fields(TrainingConfig)} | options.keys() & {"steps"}
    assert not unknown, f"no such option: {sorted(unknown)}"
    batch = options.get("batch", DEFAULT_BATCH)
    steps = length.num_steps(None if tokens_per_item is None else batch * tokens_per_item)
    defaults: dict[str, Any] = {
        **(DISTILLED if distills else PUBLISHED),
        "warmup": min(MAX_WARM_UP, steps // 20),
        "bf16": device.startswith("cuda") and torch.cuda.is_bf16_supported(),
    }
    training = TrainingConfig(steps=steps, **{**defaults, **options})
    _one_of("--optimizer", training.optimizer, tuple(OPTIMIZERS))
    _one_of("--schedule", training.schedule, tuple(SCHEDULES))
    _positive("--learning-rate", training.learning_rate)
    _positive("--weight-decay", training.weight_decay, least=0)
    parts = num_processes() * training.accumulate
    if batch % parts:
        raise UserError(
            f"--batch {batch}: expected a multiple of {parts} ({num_processes()} processes, {training.accumulate} parts); choose one"
        )
    return training


def _data(requested: str | None, plan: Plan, *, distills: bool) -> str:
    """Return the source of the data; text that a model writes itself teaches it nothing, but what its teacher writes does."""
    source = plan.calibration.get("source", "self") if requested is None else requested
    if source == "self" and not distills:
        raise UserError(
            "uptrain: expected data to train on, got none or text that a model writes itself; give --data SOURCE, or --distill ORIGINAL, "
            "which writes its own"
        )
    return source


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UserError(f"{option} {value}: expected one of {', '.join(known)}")
    return value


def _positive(option: str, value: float, least: float | None = None) -> float:
    """Return a finite number above 0 or, where it is given, of at least `least`."""
    if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
        raise UserError(
            f"{option} {value:g}: expected a number {'above 0' if least is None else f'of at least {least:g}'}"
        )
    return value


def _context(requested: int | None, config: Mapping[str, Any]) -> int:
    """Return the length of a window, or where texts are cut."""
    limit = context_length(config)
    if requested is not None and limit is not None and requested > limit:
        raise UserError(f"--context {requested}: the model's own context is {limit}; choose at most that")
    return requested or min(limit or MAX_CONTEXT, MAX_CONTEXT)


def _wgqa(options: str | None, train: str, original: Path | None) -> str | None:
    """Return the parametrization as `train.wgqa.attach` takes it."""
    if options is None:
        return None
    if original is None:
        raise UserError("--wgqa: expected the model whose heads are weighed; give --original MODEL, or --distill MODEL")
    if train == "lora":
        raise UserError("--wgqa: goes with --train attention or all, not with lora; choose one")
    spec = f"wgqa:{options}" if options else "wgqa"
    weighing.parse(spec)
    return spec
