"""headfold check."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UserError
from .options import DATA, MEASURE, Debug, Json, option
from .output import answered

EXAMPLES = (
    "headfold check my-model-gqa",
    "headfold check my-model-gqa --engine transformers --engine vllm=vllm-env/bin/python",
)


def check(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint directory that headfold fold wrote, or an original.")
    ],
    engine: Annotated[
        list[str] | None,
        option(
            "--engine", panel=MEASURE, metavar="NAME[=PYTHON]",
            help="Run the model in this engine. PYTHON: the Python that has the engine; default: this one. May be repeated. "
            "all: every engine that this Python has. Without it nothing is run.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        option("--text", panel=DATA, metavar="FILE", help="Text to compute on. Default: Python source that comes with headfold."),
    ] = None,
    tokens: Annotated[
        int | None,
        option("--tokens", panel=DATA, metavar="N", min=1, help="Tokens to compare logits on. Default: 240, or what the model takes."),
    ] = None,
    new_tokens: Annotated[
        int, option("--new-tokens", panel=DATA, metavar="N", min=2, help="Greedy tokens after them.")
    ] = 64,
    adapter: Annotated[
        str | None,
        option("--adapter", panel=MEASURE, metavar="DIR", help="A LoRA adapter of peft, merged into MODEL first.")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        option(
            "--trust-remote-code", panel=MEASURE,
            help="Let engines run code that lies beside the weights, though this version of headfold did not write it.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Run a fold in serving engines.

    Compares their logits and greedy tokens, in float32, with those of headfold's runtime, and shows their speed and the size of their
    caches. Without --engine it lists the engines: how each is installed, and the command that serves the fold. The exit code is 1
    where an engine refuses the fold or computes something else."""
    from ..reports.checks import show_check
    from ..reports.progress import ProgressReport
    from ..verbs import check as verb

    with ProgressReport(brief=as_json) as progress:
        found = verb.check(
            model, engines=_engines(engine or []), text=text, tokens=tokens, new_tokens=new_tokens,
            adapter=adapter, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if not answered(found.to_json(), as_json):
        show_check(found)
    if found.is_right is False:
        raise typer.Exit(1)


def _engines(words: list[str]) -> dict[str, str | None]:
    """Return engine → Python as `--engine` names them.

    Raises:
        UserError: an engine is named twice.
    """
    from ..serving.ask import installed_here

    named: dict[str, str | None] = {}
    for word in words:
        name, given, python = word.partition("=")
        if name in named or (given and (name == "all" or not python)):
            raise UserError(f"--engine {word}: expected all, or each engine once by NAME or NAME=PYTHON; write it so")
        if word != "all":
            named[name] = python or None
    return named if "all" not in words else {**dict.fromkeys(installed_here()), **named}
