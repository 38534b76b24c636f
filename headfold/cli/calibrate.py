"""headfold calibrate."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Adapter,
    Calibration,
    Columns,
    Context,
    Debug,
    Device,
    Dtype,
    Force,
    Items,
    Json,
    Model,
    Seed,
    Tokens,
    TrustRemoteCode,
)
from .output import answered, given, names

EXAMPLES = (
    "headfold calibrate my-model stats.safetensors --calibration notes.txt --tokens 100000",
    "headfold calibrate my-t5 stats.safetensors --calibration pairs.jsonl --items 2048",
)


def calibrate(
    model: Model,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="The file to write.")],
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    calibration: Calibration = None,
    tokens: Tokens = None,
    items: Items = None,
    columns: Columns = None,
    context: Context = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the statistics that plans and folds need, once for any number of them."""
    from ..reports import views
    from ..reports.progress import ProgressReport
    from ..verbs import calibrate as verb

    chosen = given(
        adapter=adapter, calibration=calibration, tokens=tokens, items=items, columns=names(columns), context=context
    )
    with ProgressReport(brief=as_json) as progress:
        result = verb.calibrate(
            model,
            stats,
            seed=seed,
            force=force,
            device=device,
            dtype=dtype,
            progress=progress,
            say=progress.say,
            trust_remote_code=trust_remote_code,
            **chosen,
        )
    if not answered(result.to_json(), as_json):
        views.show_calibration(result)
