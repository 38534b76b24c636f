"""headfold on the command line: verbs to functions, and nothing else."""

import sys
from typing import Annotated

import typer

from ..core.errors import UserError
from ..parallel import Told, leads
from . import comparing, evaluating, looking, making, timing, training

app = typer.Typer(
    name="headfold",
    help="Fold a checkpoint's key/value heads: the same model with a smaller KV cache.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: headfold fold my-model my-model-gqa --kv-heads 1/4; in several processes: torchrun --nproc-per-node 8 -m headfold …",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"headfold {__version__}")
        raise typer.Exit


ALONE = ("inspect", "plan", "export", "route", "eval", "frontier", "compare", "bench", "probe", "methods")
"""Verbs of which one process is enough: of those that a launcher started, the first runs them."""


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
) -> None:
    """Fold a checkpoint's key/value heads: the same model with a smaller KV cache."""
    if context.invoked_subcommand in ALONE and not leads():
        raise typer.Exit


app.command(epilog="Example: headfold inspect meta-llama/Llama-2-7b-hf")(looking.inspect)
app.command(epilog="Example: headfold calibrate my-model stats.safetensors --calibration notes.txt --tokens 100000")(
    making.calibrate
)
app.command(epilog="Example: headfold plan my-model plan.json --kv-heads 1/4 --stats stats.safetensors")(making.plan)
app.command(epilog="Example: headfold fold my-model my-model-gqa --kv-heads 1/4")(making.fold)
app.command(epilog="Example: headfold export my-model-gqa my-model-decilm --layout decilm")(making.export)
app.command(epilog="Example: headfold route my-vit-gqa my-vit-routed --route kdgqa --calibration images/")(making.route)
app.command(epilog="Example: headfold uptrain my-model-gqa OUT --distill my-model --data text/ --tokens 10000000")(
    training.uptrain
)
app.command("eval", epilog="Example: headfold eval my-model-gqa --reference my-model --text notes.txt")(
    evaluating.evaluate
)
app.command(epilog="Example: headfold frontier my-model front --stats stats.safetensors")(comparing.frontier)
app.command(epilog="Example: headfold compare my-model --kv-heads 1/2,1/4 --text notes.txt")(comparing.compare)
app.command(epilog="Example: headfold bench my-model my-model-gqa --context 2048,8192")(timing.bench)
app.command(epilog="Example: headfold probe my-model --out my_family.py")(looking.probe)
app.command(epilog="Example: headfold methods absorb")(looking.methods)


def _one_line(error: UserError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


def main() -> None:
    """What a user can cause ends as one line on stderr and exit code 2; an interrupt as one line and 130."""
    try:
        app(prog_name="headfold")
    except SystemExit as leaving:
        if leaving.code == 130 and leads():
            print("headfold: interrupted", file=sys.stderr)
        raise
    except (UserError, OSError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        if leads() or not isinstance(error, Told):
            print(f"headfold: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
