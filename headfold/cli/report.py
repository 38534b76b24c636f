"""headfold report."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DATA, MEASURE, OUTPUT, Columns, Debug, Device, Force, Json, option
from .output import answered, names

EXAMPLES = (
    "headfold report my-model-gqa my-model.compare eval.json --original my-model",
    "headfold report front --out budgets.html --open",
)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Directories that headfold fold, run, compare or frontier wrote; files that eval, bench or check printed with --json.",
        ),
    ],
    original: Annotated[
        str | None,
        option(
            "--original", panel=MEASURE, metavar="MODEL",
            help="The checkpoint that the folds were made of: the page then has samples of text of both, side by side.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        option(
            "--prompt", panel=DATA, metavar="TEXT",
            help="A text that language models continue, or encoder-decoders read. May be repeated. Default: three texts to continue.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        option(
            "--text", panel=DATA, metavar="SOURCE",
            help="Data for the samples of encoder-decoders (pairs of text) or models of speech (recordings): the first three items.",
        ),
    ] = None,
    columns: Columns = None,
    new_tokens: Annotated[
        int | None,
        option(
            "--new-tokens", panel=DATA, metavar="N", min=1, help="Tokens that each model writes. Default: 64; of pairs 128, of speech 224."
        ),
    ] = None,
    device: Device = None,
    out: Annotated[Path, option("--out", panel=OUTPUT, metavar="FILE.html", help="The page to write.")] = Path("report.html"),
    show: Annotated[bool, option("--open", panel=OUTPUT, help="Open the page in a browser.")] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Write a page to look at: what was folded, what it saves and loses.

    One file of HTML that needs no network: bytes and speed before and after, loss by method, budget, layer and position, which heads
    share, samples of text, and the commands that serve it. Figures come from the files named; what was not measured is said, with the
    command that measures it."""
    from ..parallel import is_main
    from ..reports.pages import show_page_written
    from ..reports.progress import ProgressReport
    from ..verbs import report as verb

    with ProgressReport(brief=as_json) as progress:
        found = verb.report(
            paths, out=out, original=original, prompts=prompt or (), text=text, columns=names(columns) or (), new_tokens=new_tokens,
            force=force, device=device, progress=progress,
        )  # fmt: skip
    if not answered(found.to_json(), as_json):
        show_page_written(found)
    if show and is_main():
        import webbrowser

        webbrowser.open(found.out.resolve().as_uri())
