"""headfold export."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Device, Dtype, Force, Json, Layout, Verify
from .output import answered

EXAMPLES = (
    "headfold export my-pythia-gqa my-pythia-phi --layout native",
    "headfold export my-model-gqa my-model-decilm --layout decilm",
)


def export(
    folded: Annotated[Path, typer.Argument(metavar="FOLDED", help="A checkpoint that headfold fold wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    layout: Layout = None,
    verify: Verify = True,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite a fold in another layout; it computes the same function.

    Layouts are checkpoint forms that stock classes or engines read: see --layout."""
    from ..report.exports import show_export
    from ..report.progress import ProgressReport
    from ..verbs import export as verb

    with ProgressReport(silent=as_json) as progress:
        result = verb.export(
            folded, out, layout=layout, force=force, verify=verify, device=device, dtype=dtype, progress=progress
        )
    if not answered(result.to_json(), as_json):
        show_export(result)
