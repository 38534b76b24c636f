"""Continue training a folded checkpoint, by its own loss or toward its original, and write it in the same form."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.hub import resolve
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import check_place
from ..core.errors import UserError
from ..core.plan import Plan
from ..core.progress import Progress, no_progress
from ..hf_models import check_device, quiet
from ..parallel import num_processes, on_all, on_main, reachable_peers, spmd
from ..train.distillation import SITE_WEIGHT
from ..train.sharding import check_sharding
from ..train.stream import collate
from ..train.trainer import (
    AlreadyTrained,
    MarkComplete,
    ReportProgress,
    Say,
    StopWhenTrained,
    Uptrainer,
    loss_curve,
    training_arguments,
)
from ..uptraining.config import Length, check_folded, kind_and_columns, resolve_training, resolve_uptrain
from ..uptraining.job import Uptraining, UptrainResult, memory_errors

DTYPES = {"bfloat16": True, "float32": False}
"""dtype that training computes in → whether that is bfloat16 autocast. Weights stay float32."""


@spmd
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
    dtype: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    callbacks: Sequence[Any] = (),
    **training: Any,
) -> UptrainResult:
    """Train the folded checkpoint `folded` and write it as `out`, a checkpoint of the same form.

    Without `distill` it trains by the model's own loss, as 2305.13245 does (Adafactor, a constant rate); with the original as `distill`
    by the KL to its outputs and the error of every site (AdamW, a rate that falls to zero). Weights are trained in float32 and
    written in the dtype of `folded`. After a kill the same call resumes from the last whole checkpoint in `OUT.partial`.

    Args:
        folded: A checkpoint directory that `headfold.fold` wrote.
        out: The directory to write.
        distill: The original to learn from.
        steps: Number of steps to train.
        tokens: Tokens of packed text to train on, instead of `steps`.
        alpha: The same tokens as a share of `pretraining_tokens`.
        pretraining_tokens: Tokens that the original was trained on.
        train: Parameters to train: "attention", "all", or "lora" (low-rank updates of the attention modules, merged at the end).
        wgqa: Options of `train.wgqa`, such as "kind=row,init=random" or "": until the end, K and V are weighted sums of the heads of
            `original`.
        original: The model whose heads `wgqa` weighs; by default `distill`.
        data: A source of `headfold.corpus` that suits the model; by default what the fold was calibrated on.
        columns: Columns of a table.
        context: Tokens per window, or where texts are cut.
        site_weight: Weight of the mean relative error of the attention outputs beside the KL.
        tensorboard: A directory for TensorBoard events.
        resume: Fail unless there is an unfinished run to resume.
        force: Replace what is at `out`.
        device: "cpu" or "cuda".
        dtype: "bfloat16" to compute under autocast, or "float32"; by default bfloat16 on GPUs that have it.
        progress: Called with (stage, done, total).
        say: Called with lines to print.
        callbacks: Further callbacks of the Trainer.
        **training: Fields of `train.trainer.TrainingConfig`: `batch`, `learning_rate`, `seed` …

    Raises:
        UserError: no fold, a plan missing beside it, data or a teacher that do not suit it, or options that exclude each other.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
        training["bf16"] = DTYPES[dtype]
    progress, where = progress or no_progress, check_device(device)

    def resolved() -> Uptraining:
        place = resolve(str(folded))
        config = check_folded(place)
        plan = Plan.load(place / "plan.json")
        kind, named = kind_and_columns(config, plan, data, columns)
        request = resolve_uptrain(
            place, Path(out), config, plan, distill=distill, original=original, train=train, wgqa=wgqa, data=data, columns=named,
            context=context, site_weight=site_weight, tensorboard=tensorboard,
        )  # fmt: skip
        length = Length(steps, tokens, alpha, pretraining_tokens)
        per_item = request.context if kind == "text" else None
        how = resolve_training(distill is not None, length, per_item, where, training)
        fingerprint = Checkpoint.open(place).fingerprint()
        settings = {"version": version("headfold"), "folded": fingerprint, **request.to_json(), **asdict(how)}
        return Uptraining(place, Path(out), config, kind, plan, request, how, settings, where)

    run = on_all(resolved)
    on_main(lambda: check_place(run.out, force))
    ready = on_all(run.prepare)  # a request that is refused touches nothing that an earlier run has left
    with run.opened(resume, force):
        last = on_all(run.last_checkpoint)
        per_step = run.training.batch * ready.tokens_per_item
        telling = ReportProgress(
            lambda done, total: progress("uptrain", done, total), say or (lambda line: None), per_step, run.unit
        )
        trainer = Uptrainer(
            model=ready.model,
            args=training_arguments(run.training, run.work, where, run.request.tensorboard, num_processes()),
            train_dataset=ready.stream,
            data_collator=collate,
            callbacks=[MarkComplete(), StopWhenTrained(), telling, *callbacks],
            distillation=ready.distillation,
        )
        on_all(lambda: check_sharding(trainer, run.training.optimizer, last))
        counts = ready.parameter_counts
        started = time.monotonic()
        with quiet(), reachable_peers(), memory_errors(), suppress(AlreadyTrained):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds, begun = time.monotonic() - started, 0 if last is None else int(last.name.rpartition("-")[2])
        trained = run.trained_model(trainer, ready.distillation)

        def write() -> UptrainResult:
            compared = run.write(trained, ready.dtype, ready.stream)
            rate = (run.training.steps - begun) * per_step / max(seconds, 1e-9)
            teacher = None if run.request.teacher is None else str(run.request.teacher)
            result = UptrainResult(
                run.out, run.kind, run.request.data, teacher, run.request.train, run.training, *counts, begun,
                run.training.steps * per_step, rate, round(seconds, 3), loss_curve(trainer.state.log_history), *compared,
            )  # fmt: skip
            run.finish(result, force)
            return result

        return on_main(write)
