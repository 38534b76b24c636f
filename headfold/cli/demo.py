"""headfold demo."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Device, Dtype, Force, Json
from .output import answered

EXAMPLES = ("headfold demo", "headfold demo my-first-fold --json")


def demo(
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Where to leave the fold. Default: it is removed after measuring."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold the bundled model once, and show it before and after.

    Folds a small language model that is part of this package to half of its K/V heads, and measures both on held-out text: under a minute,
    and nothing else is needed."""
    from ..reports.demo import show_demo
    from ..reports.progress import ProgressReport
    from ..verbs import demo as verb

    with ProgressReport(brief=as_json) as progress:
        result = verb.demo(out, force=force, device=device, dtype=dtype, progress=progress)
    if not answered(result.to_json(), as_json):
        show_demo(result)
