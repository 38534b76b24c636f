"""headfold frontier."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    HOW,
    Adapter,
    Allowed,
    Debug,
    Device,
    Dtype,
    Force,
    Group,
    HeadDimMultiple,
    HeadWidth,
    Json,
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
    "headfold frontier my-model front --stats stats.safetensors",
    "headfold frontier my-model front --stats stats.safetensors --head-dim-multiple auto",
)


def frontier(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.")],
    adapter: Adapter = None,
    allowed: Allowed = None,
    tp: Tp = 1,
    head_dim_multiple: HeadDimMultiple = None,
    group: Group = None,
    merge: Merge = None,
    refit: Refit = True,
    measure: Annotated[
        int,
        option("--measure", panel=HOW, metavar="N", min=0, help="Points to fold in memory and measure; the others are predicted."),
    ] = 5,
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
) -> None:  # fmt: skip
    """Show what each size of the K/V cache costs.

    Writes the Pareto front of K/V bytes against loss: frontier.json, a plan for every point (for headfold fold --plan), a
    picture, and with the extra report a page to look at."""
    from ..reports import comparisons
    from ..reports.progress import ProgressReport
    from ..verbs import frontier as verb

    chosen = given(
        allowed=allowed and counts("--allowed", allowed), sensitivity=sensitivity, group=group, merge=merge, stats=stats,
        adapter=adapter,
        head_dim_multiple=renamed("--head-width", "--head-dim-multiple", head_width, head_dim_multiple),
    )  # fmt: skip
    with ProgressReport(brief=as_json) as progress:
        found = verb.frontier(
            model, out, tp=tp, measured=measure, refit=refit, seed=seed, workers=workers, force=force, device=device,
            dtype=dtype, progress=progress, **chosen,
        )  # fmt: skip
    if not answered(found.to_json(), as_json):
        comparisons.show_frontier(found)
