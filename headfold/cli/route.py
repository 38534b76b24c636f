"""headfold route."""

from pathlib import Path
from typing import Annotated

import typer

from .options import HOW, Calibration, Columns, Context, Debug, Device, Dtype, Force, Items, Json, Seed, Tokens, option
from .output import answered, given, names

EXAMPLES = (
    "headfold route my-vit-gqa my-vit-routed --calibration images/",
    "headfold route my-model-gqa my-model-routed --route dgqa:published=true --calibration notes.txt",
)


def route(
    folded: Annotated[Path, typer.Argument(metavar="FOLDED", help="A checkpoint with grouped K/V heads.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    route: Annotated[
        str,
        option("--route", panel=HOW, metavar="ROUTE", help="How query heads are divided; see headfold methods."),
    ] = "kdgqa",
    seed: Seed = 0,
    calibration: Calibration = None,
    tokens: Tokens = None,
    items: Items = None,
    columns: Columns = None,
    context: Context = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Divide query heads among K/V heads by the norms of keys.

    The route measures the keys on calibration data and fixes which query heads read which K/V head: groups of different sizes, the same
    weights and cache. OUT is opened again and compared with the routed model."""
    from ..reports import views
    from ..reports.progress import ProgressReport
    from ..verbs import route as verb

    chosen = given(calibration=calibration, tokens=tokens, items=items, columns=names(columns), context=context)
    with ProgressReport(brief=as_json) as progress:
        result = verb.route(
            folded, out, route=route, seed=seed, force=force, device=device, dtype=dtype, progress=progress, **chosen
        )
    if not answered(result.to_json(), as_json):
        views.show_route(result)
