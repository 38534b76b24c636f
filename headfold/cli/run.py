"""headfold run."""

from pathlib import Path
from typing import Annotated

import typer

from .options import WHAT, Debug, Device, Force, Json, TrustRemoteCode, option
from .output import answered

EXAMPLES = (
    "headfold run my-model-gqa/headfold.yaml my-model-gqa-again",
    "headfold run three-ways.yaml folds --model my-finetune",
)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe: the headfold.yaml of a fold, or your own.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    model: Annotated[
        str | None, option("--model", panel=WHAT, metavar="MODEL", help="The model to fold, instead of the one in the recipe.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Repeat a fold, or fold several ways and compare.

    Every fold holds a headfold.yaml that makes the same bytes again. A recipe written by hand may fold a model several ways, measure
    each fold beside it, and write a page on all. Run the same command again after a kill: it goes on with what is missing."""
    from ..reports.progress import ProgressReport
    from ..reports.runs import show_run
    from ..verbs import run as verb

    with ProgressReport(brief=as_json) as progress:
        found = verb.run(
            recipe, out, model=model, trust_remote_code=trust_remote_code, force=force, device=device, progress=progress, say=progress.say
        )  # fmt: skip
    if not answered(found.to_json(), as_json):
        show_run(found)
