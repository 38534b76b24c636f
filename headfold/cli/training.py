"""The verb that trains: uptrain."""

from pathlib import Path
from typing import Annotated

import typer

from ..parallel import leads
from ..report import views
from ..report.progress import ProgressReport
from .answers import answer, given, names
from .options import Columns, Context, Debug, Force, Json, Seed


def uptrain(
    folded: Annotated[str, typer.Argument(metavar="FOLDED", help="What headfold fold wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill", metavar="ORIGINAL", help="Learn from the model it was folded from. Default: from data alone."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="How long to train.")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", min=1, help="The same, in tokens of text.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha", metavar="SHARE", help="The same, as a share of --pretraining-tokens; 0.05 in 2305.13245."
        ),
    ] = None,
    pretraining_tokens: Annotated[
        int | None,
        typer.Option("--pretraining-tokens", metavar="N", min=1, help="What the original was trained with."),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            "--train", metavar="WHAT", help="attention, all, or lora: low-rank updates of attention, merged in."
        ),
    ] = "attention",
    wgqa: Annotated[
        str | None,
        typer.Option(
            "--wgqa",
            metavar="OPTIONS",
            help="K and V as weighted sums of the original's heads while training: kind=scalar|row|column,init=mean|random,frozen=true.",
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", metavar="MODEL", help="Whose heads --wgqa weighs. Default: --distill.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="As in --calibration. Default: what the fold was calibrated on."),
    ] = None,
    columns: Columns = None,
    context: Context = None,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Items of a step, over all processes.")
    ] = 16,
    accumulate: Annotated[
        int,
        typer.Option(
            "--accumulate", metavar="N", min=1, help="Parts that a process takes its share in, to save memory."
        ),
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", metavar="RATE", help="Default: 5e-4 with --distill, else 1e-3."),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer", metavar="NAME", help="adamw or adafactor. Default: adamw with --distill, else adafactor."
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="constant, linear or cosine. Default: linear with --distill, else constant.",
        ),
    ] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", metavar="N", min=0, help="Steps. Default: 5 %, at most 100.")
    ] = None,
    weight_decay: Annotated[float, typer.Option("--weight-decay", metavar="RATE", min=0, help="AdamW's.")] = 0.0,
    site_weight: Annotated[
        float,
        typer.Option(
            "--site-weight", metavar="W", min=0, help="Of the attentions' relative error beside the KL, with --distill."
        ),
    ] = 1.0,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="Autocast. Default: on GPUs that have it; weights stay float32."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Half the memory of activations or less, for more time.")
    ] = False,
    save_every: Annotated[
        int, typer.Option("--save-every", metavar="STEPS", min=1, help="What a killed run loses at most.")
    ] = 500,
    log_every: Annotated[
        int, typer.Option("--log-every", metavar="STEPS", min=1, help="How often losses are noted.")
    ] = 10,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the learning curve.")] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write its events there.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on with an unfinished run; never begin one.")
    ] = False,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a fold on, by its own loss or by its original.

    OUT is an ordinary checkpoint of FOLDED's form. The same command goes on from OUT.partial after a kill. Runs under torchrun and
    accelerate launch too."""
    from ..recipe import uptraining
    from ..report.plot import draw_curve, require_plot

    if plot is not None:
        require_plot(plot)
    chosen = given(
        distill=distill, steps=steps, tokens=tokens, alpha=alpha, pretraining_tokens=pretraining_tokens, data=data,
        columns=names(columns), context=context, learning_rate=learning_rate, optimizer=optimizer, schedule=schedule, warmup=warmup,
        bf16=bf16, tensorboard=tensorboard, wgqa=wgqa, original=original,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        result = uptraining.uptrain(
            folded, out, train=train, batch=batch, accumulate=accumulate, weight_decay=weight_decay, site_weight=site_weight,
            gradient_checkpointing=gradient_checkpointing, save_every=save_every, log_every=log_every, resume=resume, seed=seed,
            force=force, progress=progress, say=progress.say, **chosen,
        )  # fmt: skip
    if plot is not None and leads():
        draw_curve(plot, result.curve, f"{Path(folded).name}, uptrained")
    answer(result.to_json(), as_json) or views.show_uptraining(result)
