"""headfold on the command line: words to verbs, results to reports, and nothing else."""

import inspect as inspection
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from .. import threads
from ..checkpoint.disk import reason
from ..core.errors import AlreadyFinished, UserError
from ..parallel import is_main
from . import (
    bench,
    calibrate,
    check,
    compare,
    demo,
    detect,
    evaluate,
    export,
    fold,
    frontier,
    inspect,
    methods,
    plan,
    report,
    route,
    run,
    uptrain,
)

app = typer.Typer(
    name="headfold",
    help="Fold a checkpoint's key/value heads: the same model with a smaller KV cache.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: headfold demo\n\nExample: headfold fold my-model my-model-gqa --kv-heads 1/4\n\n"
    "Example: torchrun --nproc-per-node 8 -m headfold fold my-model my-model-gqa --kv-heads 1/4",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
FIRST, FOLD, AFTER, MEASURE = "First", "Fold", "After a fold", "Measure and compare"
"""Panels of verbs."""


def _version(requested: bool) -> bool:
    if requested:
        from .. import __version__

        print(f"headfold {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Fold a checkpoint's key/value heads: the same model with a smaller KV cache."""


def _add(panel: str, verb: Callable[..., None], examples: tuple[str, ...], **options: Any) -> None:
    paragraphs = inspection.cleandoc(verb.__doc__ or "").split("\n\n")
    text = "\n\n".join(
        " ".join(paragraph.split()) for paragraph in paragraphs
    )  # lines are broken by the terminal's width
    epilog = "\n\n".join(f"Example: {example}" for example in examples)
    app.command(help=text, epilog=epilog, rich_help_panel=panel, **options)(verb)


_add(FIRST, demo.demo, demo.EXAMPLES)
_add(FIRST, inspect.inspect, inspect.EXAMPLES)
_add(FIRST, methods.methods, methods.EXAMPLES)
_add(FIRST, detect.detect, detect.EXAMPLES)
_add(FIRST, detect.probe, detect.EXAMPLES, name="probe", hidden=True)  # the former name, for one release
_add(FOLD, calibrate.calibrate, calibrate.EXAMPLES)
_add(FOLD, plan.plan, plan.EXAMPLES)
_add(FOLD, fold.fold, fold.EXAMPLES)
_add(FOLD, run.run, run.EXAMPLES)
_add(AFTER, export.export, export.EXAMPLES)
_add(AFTER, check.check, check.EXAMPLES)
_add(AFTER, route.route, route.EXAMPLES)
_add(AFTER, uptrain.uptrain, uptrain.EXAMPLES)
_add(MEASURE, evaluate.evaluate, evaluate.EXAMPLES, name="eval")
_add(MEASURE, compare.compare, compare.EXAMPLES)
_add(MEASURE, frontier.frontier, frontier.EXAMPLES)
_add(MEASURE, bench.bench, bench.EXAMPLES)
_add(MEASURE, report.report, report.EXAMPLES)


_UsageErrors: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Words that the command line does not know. Typer has the class from click or, of late, a copy of its own."""


def _usage(error: Any) -> str:
    """Return what is wrong with the words of a command, in a line."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "headfold"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{command}: {said}; see {command} --help"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch could not allocate memory: on a GPU it says so by a type of its own, on a CPU by its words alone."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _one_line(error: UserError | OSError | MemoryError | RuntimeError) -> str:
    if isinstance(error, MemoryError | RuntimeError):
        said = " ".join(str(error).split())[:200]
        return f"out of memory{said and f' ({said})'}; give less data or a shorter context, or use a larger machine"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{reason(error) or error.strerror}"
    return " ".join(str(error).split())


def _check_words(words: Sequence[str]) -> None:
    """Refuse words that are no text, which could be neither printed nor written to a card.

    Raises:
        UserError: names the first of them.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{os.fsencode(word)!r}: expected a name in UTF-8, got other bytes; rename it") from error


def main() -> None:
    """Run the command line: what a user can cause ends as one line on stderr and exit code 2, an interrupt as one line and 130."""
    threads.prepare()
    try:
        _check_words(sys.argv[1:])
        code = app(prog_name="headfold", standalone_mode=False)
    except _UsageErrors as error:
        if is_main() and type(error).__name__ != "NoArgsIsHelpError":  # it has printed the help
            print(_usage(error), file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        if "--debug" in sys.argv[1:]:
            raise
        if is_main():
            print(f"headfold: {_one_line(error)}", file=sys.stderr)
        sys.exit(0 if isinstance(error, AlreadyFinished) else 2)
    if code == 130 and is_main():
        print("headfold: interrupted", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
