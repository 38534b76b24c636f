"""Train a folded checkpoint on, and write it again as an ordinary one: what is asked for, checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.hub import resolve
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import refuse_overlap
from ..core.errors import UserError
from ..core.plan import Plan
from ..corpus.samples import kind_of
from ..parallel import alike, everyone, processes
from ..runtime.load import read_checked_config
from ..train import wgqa as weighing
from ..train.attentions import SCOPES
from ..train.distillation import SITE_WEIGHT
from ..train.trainer import OPTIMIZERS, SCHEDULES, Say, TrainingConfig
from .measuring import MAX_CONTEXT, default_device
from .source import Progress, context_limit, silent
from .training import TrainingRun, UptrainConfig, UptrainResult

PUBLISHED = {"optimizer": "adafactor", "learning_rate": 1e-3, "schedule": "constant"}
"""2305.13245, 2.2: Adafactor with the pre-training's own schedule, which for T5 ends at a constant rate."""
DISTILLED = {"optimizer": "adamw", "learning_rate": 5e-4, "schedule": "linear"}
MAX_WARM_UP = 100


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
    wgqa: str | None = None,
    original: str | Path | None = None,
    data: str | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    site_weight: float = SITE_WEIGHT,
    tensorboard: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    callbacks: Sequence[Any] = (),
    **how: Any,
) -> UptrainResult:
    """Train the folded checkpoint `folded` and write it as `out`, a checkpoint of the same form.

    Without `distill` by the model's own loss, as 2305.13245 uptrains (Adafactor, a constant rate); with the original as `distill` by the
    KL to its outputs and the error of every attention (AdamW, a rate that falls to zero). `train` says what is trained:
    attention, all, or lora (low-rank updates of the attentions, merged at the end). With `wgqa`, options of `train.wgqa` such as
    `kind=row,init=random` or "", K and V are weighted sums of the heads of `original` (default: `distill`) until the end. `data` is any
    source of `headfold.corpus` that suits the model (default: what the fold was calibrated on). How long: `steps`, `tokens` of packed text,
    or a share `alpha` of the `pretraining_tokens`. `how` are fields of `train.trainer.TrainingConfig`: `batch`, `learning_rate`, `bf16` … Weights
    are trained in float32 (with `bf16` under autocast; default: on GPUs that have it) and written in the dtype of `folded`.

    The same call after a kill goes on from the last whole checkpoint in `OUT.partial`; `resume` insists that there is one.
    `callbacks` are further ones of the Trainer's.

    Raises:
        UserError: no fold, no plan beside it, data or a teacher that do not suit it, options that exclude each other.
    """

    def opened() -> tuple[TrainingRun, UptrainConfig]:
        place = resolve(str(folded))
        config = _checked(place)
        kind, plan = kind_of(config), Plan.load(place / "plan.json")
        fingerprint = Checkpoint.open(place).fingerprint()
        teacher, source_of_heads = (None if p is None else resolve(str(p)) for p in (distill, original or distill))
        for other in filter(None, (place, teacher, source_of_heads)):
            refuse_overlap(other, Path(out))
        if teacher is not None and Checkpoint.open(teacher).fingerprint() == fingerprint:
            raise UserError(
                f"--distill {distill}: expected the original, got the fold itself, which it has nothing to learn from"
            )
        length, on = _length(context, config), device or default_device()
        budget = _Budget(steps, tokens, alpha, pretraining_tokens)
        recipe = _recipe(
            PUBLISHED if teacher is None else DISTILLED, budget, length if kind == "text" else None, on, how
        )
        asked = UptrainConfig(
            train=_known("--train", train, SCOPES), data=_data(data, plan), columns=tuple(columns), context=length, teacher=teacher,
            site_weight=_positive("--site-weight", site_weight, least=0), wgqa=_wgqa(wgqa, train, source_of_heads),
            original=source_of_heads, tensorboard=None if tensorboard is None else Path(tensorboard),
        )  # fmt: skip
        settings = {"version": version("headfold"), "folded": fingerprint, **asked.to_json(), **asdict(recipe)}
        said = say or (lambda line: None)
        run = TrainingRun(place, Path(out), config, kind, plan, settings, recipe, on, progress or silent, said)
        return run, asked

    with alike():
        run, asked = everyone(opened)
        return run.carry_out(asked, resume=resume, force=force, callbacks=callbacks)


@dataclass(frozen=True, slots=True)
class _Budget:
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
        if self.tokens is not None:
            return math.ceil(self.tokens / tokens_per_step)
        assert self.alpha is not None and self.pretraining_tokens is not None
        return math.ceil(_positive("--alpha", self.alpha) * self.pretraining_tokens / tokens_per_step)


def _checked(folded: Path) -> dict[str, Any]:
    config = read_checked_config(folded)
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


def _known(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UserError(f"{option} {value}: expected one of {', '.join(known)}")
    return value


def _positive(option: str, value: float, least: float | None = None) -> float:
    """A finite number above 0 or, where there is one, from `least` on."""
    if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
        raise UserError(f"{option} {value:g}: expected a number {'above 0' if least is None else f'from {least:g} on'}")
    return value


def _length(asked: int | None, config: Mapping[str, Any]) -> int:
    """Of a window, or where texts are cut."""
    limit = context_limit(config)
    if asked is not None and limit is not None and asked > limit:
        raise UserError(f"--context {asked}: the model's own context is {limit}; choose at most that")
    return asked or min(limit or MAX_CONTEXT, MAX_CONTEXT)


def _wgqa(options: str | None, train: str, original: Path | None) -> str | None:
    """The parametrization as `train.wgqa.attach` takes it."""
    if options is None:
        return None
    if original is None:
        raise UserError("--wgqa: expected the model whose heads are weighed; give --original MODEL, or --distill MODEL")
    if train == "lora":
        raise UserError("--wgqa: goes with --train attention or all, not with lora; choose one")
    spec = f"wgqa:{options}" if options else "wgqa"
    weighing.parse(spec)
    return spec


def _recipe(
    defaults: Mapping[str, Any], budget: _Budget, tokens_per_item: int | None, device: str, how: Mapping[str, Any]
) -> TrainingConfig:
    """Defaults filled in, and the batch checked to be one that can be divided."""
    given = {name: value for name, value in how.items() if value is not None}
    unknown = given.keys() - {field.name for field in fields(TrainingConfig)} | given.keys() & {"steps"}
    assert not unknown, f"no such option: {sorted(unknown)}"
    batch = given.get("batch", TrainingConfig.batch)
    steps = budget.num_steps(None if tokens_per_item is None else batch * tokens_per_item)
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    recipe = TrainingConfig(steps=steps, **{**defaults, "warmup": min(MAX_WARM_UP, steps // 20), "bf16": bf16, **given})
    _known("--optimizer", recipe.optimizer, tuple(OPTIMIZERS))
    _known("--schedule", recipe.schedule, tuple(SCHEDULES))
    _positive("--learning-rate", recipe.learning_rate)
    _positive("--weight-decay", recipe.weight_decay, least=0)
    parts = processes() * recipe.accumulate
    if batch % parts:
        raise UserError(
            f"--batch {batch}: expected a multiple of {parts} ({processes()} processes, {recipe.accumulate} parts); choose one"
        )
    return recipe
