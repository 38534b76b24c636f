"""headfold plan."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    HOW,
    WHAT,
    Adapter,
    Allowed,
    Debug,
    Device,
    Dtype,
    Encoder,
    Force,
    Group,
    HeadDimMultiple,
    HeadWidth,
    Json,
    KvHeads,
    Merge,
    Model,
    Refit,
    Seed,
    Sensitivity,
    StatsFile,
    Tp,
    Workers,
    option,
)  # fmt: skip
from .output import answered, counts, given, renamed

EXAMPLES = (
    "headfold plan my-model plan.json --kv-heads 1/4 --stats stats.safetensors",
    "headfold plan my-model plan.json --kv-budget 25% --stats stats.safetensors",
)


def plan(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="PLAN.json", help="The file to write.")],
    kv_heads: KvHeads = None,
    kv_budget: Annotated[
        str | None,
        option("--kv-budget", panel=WHAT, metavar="SHARE", help="Share of the K/V cache to keep, allocated to layers: 25% or 1/4."),
    ] = None,
    kv_bytes: Annotated[
        str | None,
        option("--kv-bytes", panel=WHAT, metavar="SIZE", help="K/V bytes per token to keep, allocated to layers: 40KiB."),
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        option(
            "--max-loss-increase", panel=WHAT, metavar="NATS",
            help="Largest predicted loss increase, in nats per token; the smallest cache within it is planned.",
        ),
    ] = None,
    encoder: Encoder = False,
    adapter: Adapter = None,
    allowed: Allowed = None,
    tp: Tp = 1,
    allocation: Annotated[
        str | None,
        option("--allocation", panel=HOW, metavar="METHOD", help="exact, or qcqa (the second stage of QCQA, for "
            "comparison). Default: exact."),
    ] = None,
    head_dim_multiple: HeadDimMultiple = None,
    group: Group = None,
    merge: Merge = None,
    refit: Refit = True,
    seed: Seed = 0,
    stats: StatsFile = None,
    sensitivity: Sensitivity = None,
    workers: Workers = 1,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
    head_width: HeadWidth = None,
    max_rise: Annotated[float | None, typer.Option("--max-rise", hidden=True)] = None,
    spread: Annotated[str | None, typer.Option("--spread", hidden=True)] = None,
) -> None:  # fmt: skip
    """Choose which K/V heads are merged, and predict the error.

    With --kv-heads every layer keeps the same number of K/V heads. With --kv-budget, --kv-bytes or --max-loss-increase layers get
    counts of their own: each is folded alone on a part of the calibration data to measure what that costs, and the best allocation is
    found exactly. By default counts divide the number of K/V heads, as engines require; with --group swap:unequal=true groups differ in
    size and any count may be used."""
    from ..advice.commands import next_fold
    from ..budget.curves import loses_nats
    from ..conversion.serving_cost import serving_cost
    from ..conversion.source import open_source
    from ..reports import views
    from ..reports.progress import ProgressReport
    from ..verbs import plan as verb

    head_dim_multiple = renamed("--head-width", "--head-dim-multiple", head_width, head_dim_multiple)
    max_loss_increase = renamed("--max-rise", "--max-loss-increase", max_rise, max_loss_increase)
    allocation = renamed("--spread", "--allocation", spread, allocation)
    chosen = given(
        kv_heads=kv_heads, kv_budget=kv_budget, kv_bytes=kv_bytes, max_loss_increase=max_loss_increase, sensitivity=sensitivity,
        group=group, merge=merge, stats=stats, allowed=allowed and counts("--allowed", allowed),
        head_dim_multiple=head_dim_multiple, allocation=allocation, adapter=adapter,
    )  # fmt: skip
    with ProgressReport(brief=as_json) as progress:
        made = verb.plan(
            model, out, tp=tp, refit=refit, encoder=encoder, seed=seed, workers=workers, force=force, device=device, dtype=dtype,
            progress=progress, say=progress.say, **chosen,
        )  # fmt: skip
    if not answered(made.to_json(), as_json):
        source = open_source(model, encoder, adapter)
        views.show_plan(made, (serving_cost(source), serving_cost(source, made)), loses_nats(source.config))
        print(f"wrote {out}")
        options = ["--plan", str(out), *(["--stats", str(stats)] if stats else []), *([] if refit else ["--no-refit"])]
        print(f"next: {next_fold(source, max(made.num_kv_heads.values()), *options)}")
