"""headfold uptrain."""

from pathlib import Path
from typing import Annotated

import typer

from ..parallel import is_main
from .options import DATA, HOW, OUTPUT, WHERE, Columns, Context, Debug, Device, Force, Json, Seed, option
from .output import answered, given, names

EXAMPLES = (
    "headfold uptrain my-model-gqa OUT --distill my-model --data text/ --tokens 10000000",
    "headfold uptrain my-t5-gqa OUT --data pairs.jsonl --steps 1000",
)
LENGTH = "How long"


def uptrain(
    folded: Annotated[str, typer.Argument(metavar="FOLDED", help="A checkpoint that headfold fold wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    steps: Annotated[int | None, option("--steps", panel=LENGTH, metavar="N", min=1, help="Steps to train.")] = None,
    tokens: Annotated[
        int | None, option("--tokens", panel=LENGTH, metavar="N", min=1, help="Tokens of text to train on, instead of --steps.")
    ] = None,
    alpha: Annotated[
        float | None,
        option("--alpha", panel=LENGTH, metavar="SHARE", help="Tokens as a share of --pretraining-tokens; 0.05 in 2305.13245."),
    ] = None,
    pretraining_tokens: Annotated[
        int | None,
        option("--pretraining-tokens", panel=LENGTH, metavar="N", min=1, help="Tokens that the original was trained on."),
    ] = None,
    distill: Annotated[
        str | None,
        option("--distill", panel=HOW, metavar="ORIGINAL", help="Distill from the original of the fold. Default: train on data alone."),
    ] = None,
    train: Annotated[
        str,
        option("--train", panel=HOW, metavar="WHAT", help="attention, all, or lora: low-rank updates of attention, merged in."),
    ] = "attention",
    wgqa: Annotated[
        str | None,
        option(
            "--wgqa", panel=HOW, metavar="OPTIONS",
            help="Train K and V as weighted sums of the original's heads: kind=scalar|row|column,init=mean|random,frozen=true.",
        ),
    ] = None,
    original: Annotated[
        str | None,
        option("--original", panel=HOW, metavar="MODEL", help="The model whose heads --wgqa weighs. Default: --distill."),
    ] = None,
    batch: Annotated[
        int, option("--batch", panel=HOW, metavar="N", min=1, help="Items per step, over all processes.")
    ] = 16,
    learning_rate: Annotated[
        float | None,
        option("--learning-rate", panel=HOW, metavar="RATE", help="Default: 5e-4 with --distill, else 1e-3."),
    ] = None,
    optimizer: Annotated[
        str | None,
        option("--optimizer", panel=HOW, metavar="NAME", help="adamw or adafactor. Default: adamw with --distill, else adafactor."),
    ] = None,
    schedule: Annotated[
        str | None,
        option("--schedule", panel=HOW, metavar="NAME", help="constant, linear or cosine. Default: linear with --distill, else constant."),
    ] = None,
    warmup: Annotated[
        int | None, option("--warmup", panel=HOW, metavar="N", min=0, help="Warm-up steps. Default: 5 %, at most 100.")
    ] = None,
    weight_decay: Annotated[
        float, option("--weight-decay", panel=HOW, metavar="RATE", min=0, help="Weight decay of AdamW.")
    ] = 0.0,
    site_weight: Annotated[
        float,
        option("--site-weight", panel=HOW, metavar="W", min=0, help="Weight of the attention outputs' error beside the KL of --distill."),
    ] = 1.0,
    seed: Seed = 0,
    data: Annotated[
        str | None,
        option("--data", panel=DATA, metavar="SOURCE", help="As in --calibration. Default: what the fold was calibrated on."),
    ] = None,
    columns: Columns = None,
    context: Context = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        option("--dtype", panel=WHERE, metavar="DTYPE", help="float32, or bfloat16 autocast. Default: bfloat16 on GPUs that have it."),
    ] = None,
    bf16: Annotated[
        bool | None, option("--bf16/--no-bf16", panel=WHERE, help="The same as --dtype bfloat16 or float32; weights stay float32.")
    ] = None,
    accumulate: Annotated[
        int,
        option("--accumulate", panel=WHERE, metavar="N", min=1, help="Parts that each process divides its batch into, to save memory."),
    ] = 1,
    gradient_checkpointing: Annotated[
        bool,
        option("--gradient-checkpointing", panel=WHERE, help="Recompute activations: half their memory or less, for more time."),
    ] = False,
    save_every: Annotated[
        int, option("--save-every", panel=OUTPUT, metavar="STEPS", min=1, help="Steps between checkpoints to resume from.")
    ] = 500,
    log_every: Annotated[
        int, option("--log-every", panel=OUTPUT, metavar="STEPS", min=1, help="Steps between recorded losses.")
    ] = 10,
    plot: Annotated[
        Path | None, option("--plot", panel=OUTPUT, metavar="FILE.png", help="Draw the learning curve.")
    ] = None,
    tensorboard: Annotated[
        Path | None, option("--tensorboard", panel=OUTPUT, metavar="DIR", help="Write TensorBoard events to this directory.")
    ] = None,
    resume: Annotated[
        bool, option("--resume", panel=OUTPUT, help="Fail unless there is an unfinished run to resume.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Continue training a fold, by its own loss or by distillation.

    OUT is a checkpoint of the same form as FOLDED. After a kill, the same command resumes from OUT.partial. Several processes are
    started by torchrun or accelerate launch."""
    from ..outputs import refuse_existing
    from ..reports import views
    from ..reports.plot import draw_curve, require_plot
    from ..reports.progress import ProgressReport
    from ..verbs import uptrain as verb

    if plot is not None:
        require_plot(plot)
        refuse_existing(plot, force)
    chosen = given(
        distill=distill, steps=steps, tokens=tokens, alpha=alpha, pretraining_tokens=pretraining_tokens, data=data,
        columns=names(columns), context=context, learning_rate=learning_rate, optimizer=optimizer, schedule=schedule, warmup=warmup,
        bf16=bf16, tensorboard=tensorboard, wgqa=wgqa, original=original, dtype=dtype, device=device,
    )  # fmt: skip
    with ProgressReport(brief=as_json) as progress:
        result = verb.uptrain(
            folded, out, train=train, batch=batch, accumulate=accumulate, weight_decay=weight_decay, site_weight=site_weight,
            gradient_checkpointing=gradient_checkpointing, save_every=save_every, log_every=log_every, resume=resume, seed=seed,
            force=force, progress=progress, say=progress.say, **chosen,
        )  # fmt: skip
    if plot is not None and is_main():
        draw_curve(plot, result.curve, f"{Path(folded).name}, uptrained")
    if not answered(result.to_json(), as_json):
        views.show_uptraining(result)
