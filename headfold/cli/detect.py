"""headfold detect, and its former name, probe."""

import sys
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..parallel import is_main
from .options import OUTPUT, Debug, Force, Json, TrustRemoteCode, option
from .output import answered

EXAMPLES = ("headfold detect my-model", "headfold detect my-model --out my_family.py")


def detect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a hub id or a model_type of transformers.")
    ],
    out: Annotated[
        Path | None,
        option("--out", panel=OUTPUT, metavar="FAMILY.py", help="Write the family literal as Python source."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Detect an unknown architecture's attention and prove it foldable.

    A toy model with random weights is built from the config. Its projections are found, every freedom of K, V and the order of heads
    is tried on it, and the resulting family literal must pass all family laws."""
    from ..reports import views
    from ..reports.progress import ProgressReport
    from ..verbs import detect as verb

    with ProgressReport(brief=as_json) as progress:
        found = verb.detect(model, out=out, trust_remote_code=trust_remote_code, force=force, progress=progress)
    if not answered(found.to_json(), as_json):
        views.show_detection(found, out)


@wraps(detect)
def probe(*arguments: Any, **options: Any) -> None:
    """Run `detect` under the name that it had before 0.2.0."""
    if is_main():
        print("headfold: probe is now called detect; the old name goes with the next release", file=sys.stderr)
    detect(*arguments, **options)
