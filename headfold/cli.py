"""headfold on the command line: verbs to functions, and nothing else."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .core.errors import UserError
from .report import views
from .report.progress import ProgressReport

app = typer.Typer(
    name="headfold",
    help="Fold a checkpoint's key/value heads: the same model with a smaller KV cache.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: headfold fold my-model my-model-gqa --kv-heads 1/4",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory or a hub id.")]
StatsFile = Annotated[Path | None, typer.Option("--stats", metavar="STATS", help="What headfold calibrate wrote.")]
KvHeads = Annotated[
    str | None, typer.Option("--kv-heads", metavar="N", help="K/V heads to keep: a count (4) or a share (1/2).")
]
Group = Annotated[
    str | None,
    typer.Option("--group", metavar="METHOD", help="Who shares a head; see headfold methods. Default: swap."),
]
Merge = Annotated[
    str | None,
    typer.Option("--merge", metavar="METHOD", help="How they become one; see headfold methods. Default: absorb."),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="SOURCE",
        help="A text file or folder, FILE.jsonl[:COLUMN], FILE.parquet[:COLUMN], a hub dataset "
        "(hub:NAME[:CONFIG][:SPLIT][:COLUMN]), stdlib (this machine's Python sources) or self (text that the model writes). Default: self.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", min=1, help="Calibration tokens of a language model. Default: 65536."),
]
Items = Annotated[
    int | None,
    typer.Option(
        "--items",
        metavar="N",
        min=1,
        help="Calibration items of other models. Default: 2048 pairs or sentences, 512 images or sounds.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns", metavar="NAME,NAME", help="Where a source has them under other names than source,target or image."
    ),
]
Encoder = Annotated[
    bool, typer.Option("--encoder", help="Fold an encoder-decoder's encoder too; by default only its decoder.")
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", metavar="N", min=2, help="Tokens per window. Default: the model's own, at most 1024 (eval: 2048)."
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="native, padded (unequal groups), per-layer or decilm (a count per layer), or headfold (its own runtime's). "
        "Default: the one that stock transformers loads, if there is one.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn at random.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"headfold {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
) -> None:
    """Fold a checkpoint's key/value heads: the same model with a smaller KV cache."""


@app.command(epilog="Example: headfold inspect meta-llama/Llama-2-7b-hf")
def inspect(model: Model, stats: StatsFile = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show heads, cache size and the predicted cost of folding.

    The strips show, layer by layer, the error predicted for keeping 1/2, 1/4 and 1/8 of the K/V heads."""
    from . import recipe

    found = recipe.inspect(model, stats=stats)
    _answer(found.to_json(), as_json) or views.show_inspection(found)


@app.command(epilog="Example: headfold calibrate my-model stats.safetensors --calibration notes.txt --tokens 100000")
def calibrate(
    model: Model,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="The file to write.")],
    calibration: Calibration = None,
    tokens: Tokens = None,
    items: Items = None,
    columns: Columns = None,
    context: Context = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure once what attention sees, for any number of folds."""
    from . import recipe

    chosen = _given(calibration=calibration, tokens=tokens, items=items, columns=_names(columns), context=context)
    with ProgressReport(silent=as_json) as progress:
        result = recipe.calibrate(model, stats, seed=seed, force=force, progress=progress, **chosen)
    _answer(result.to_json(), as_json) or views.show_calibration(result)


@app.command(epilog="Example: headfold plan my-model plan.json --kv-heads 1/4 --stats stats.safetensors")
def plan(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="PLAN.json", help="The file to write.")],
    kv_heads: KvHeads = None,
    group: Group = None,
    merge: Merge = None,
    stats: StatsFile = None,
    encoder: Encoder = False,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decide which heads share one, and predict the loss."""
    if kv_heads is None:
        raise UserError("plan: expected --kv-heads N, a count such as 4 or a share such as 1/2; got none")
    from . import recipe

    chosen = _given(group=group, merge=merge, stats=stats)
    with ProgressReport(silent=as_json) as progress:
        made = recipe.plan(
            model, out, kv_heads=kv_heads, encoder=encoder, seed=seed, force=force, progress=progress, **chosen
        )
    if not _answer(made.to_json(), as_json):
        views.show_plan_errors(made)
        print(f"wrote {out}")


@app.command(epilog="Example: headfold fold my-model my-model-gqa --kv-heads 1/4")
def fold(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    kv_heads: KvHeads = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="PLAN.json", help="What headfold plan wrote.")] = None,
    group: Group = None,
    merge: Merge = None,
    refit: Annotated[
        bool,
        typer.Option("--refit/--no-refit", help="Refit W_o and W_v of every block to the original's output."),
    ] = True,
    calibration: Calibration = None,
    tokens: Tokens = None,
    items: Items = None,
    columns: Columns = None,
    context: Context = None,
    encoder: Encoder = False,
    stats: StatsFile = None,
    layout: Layout = None,
    seed: Seed = 0,
    force: Force = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload the result and compare its logits.")
    ] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model again with fewer K/V heads.

    OUT is a checkpoint directory that stock engines load, with a card (README.md) and the plan (plan.json) beside the weights."""
    _check_fold(kv_heads, plan, group, merge)
    from . import recipe

    chosen = _given(
        kv_heads=kv_heads, plan=plan, group=group, merge=merge, calibration=calibration, tokens=tokens, items=items,
        columns=_names(columns), context=context, stats=stats, layout=layout,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        result = recipe.fold(
            model, out, refit=refit, encoder=encoder, seed=seed, force=force, verify=verify, progress=progress, **chosen
        )
    _answer(result.to_json(), as_json) or views.show_fold(result)


@app.command(epilog="Example: headfold export my-model-gqa my-model-decilm --layout decilm")
def export(
    folded: Annotated[Path, typer.Argument(metavar="FOLDED", help="What headfold fold wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    layout: Layout = None,
    force: Force = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload the result and compare its logits.")
    ] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a fold again in another layout, the same function.

    Layouts are checkpoint forms that stock classes or engines read: see --layout."""
    from .recipe import exporting

    with ProgressReport(silent=as_json) as progress:
        result = exporting.export(folded, out, layout=layout, force=force, verify=verify, progress=progress)
    _answer(result.to_json(), as_json) or exporting.show(result)


@app.command("eval", epilog="Example: headfold eval my-model-gqa --reference my-model --text notes.txt")
def evaluate(
    model: Model,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="ORIGINAL", help="The model it was folded from.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="SOURCE",
            help="What to measure on: text, or any source as in --calibration; pairs of text (SRC.en,SRC.de or a table); "
            "sentences; a folder or table of images. Default, for language models alone: the bundled text.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="A,B", help="Columns of a table. Default: source,target; image,label."),
    ] = None,
    beams: Annotated[int, typer.Option("--beams", metavar="N", min=1, help="Beams that BLEU is written with.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Where an output for BLEU is cut at the latest.")
    ] = 128,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Items to measure on; tokens of plain text.")
    ] = None,
    context: Context = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, BLEU, accuracy or embeddings.

    By what the model is: a language model's perplexity and KL to the original, BLEU and loss of an encoder-decoder, accuracy of a
    classifier, likeness of an encoder's embeddings to the original's. With --reference always beside the original."""
    from .recipe import scoring

    chosen = _given(columns=columns and tuple(columns.split(",")), limit=limit, context=context)
    writing = {"beams": beams, "max_new_tokens": max_new_tokens}
    with ProgressReport(silent=as_json) as progress:
        found = scoring.evaluate(model, reference=reference, text=text, progress=progress, **writing, **chosen)
    _answer(scoring.facts(found), as_json) or views.show_evaluation(found)


@app.command(epilog="Example: headfold probe my-model --out my_family.py")
def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a hub id or a model_type of transformers.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FAMILY.py", help="Write the literal as Python source.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find an architecture's attention and prove it foldable.

    A toy model with random weights is built from the config. Its projections are found, every freedom of K, V and the order of heads
    is tried on it, and the literal that follows must pass all laws."""
    from .recipe import probing

    found = probing.probe(model, out=out, force=force)
    _answer(found.to_json(), as_json) or views.show_probe(found, out)


@app.command(epilog="Example: headfold methods absorb")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, for its whole page.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods, or show the page of one."""
    from . import group, merge
    from .core import plugins
    from .group import costs

    axes = {"--merge": (merge, "merge"), "--group": (group, "group"), "--group METHOD:cost=": (costs, "cost")}
    pages = [
        _page(option, found, plugins.load(package, found), entry)
        for option, (package, entry) in axes.items()
        for found in plugins.names(package)
        if name in (None, found)
    ]
    if not pages:
        plugins.load(merge, name or "")  # refuses, suggesting near names
    if _answer({"methods": pages}, as_json):
        return
    if name is None:
        views.show_methods(
            {option: {p["name"]: p["summary"] for p in pages if p["option"] == option} for option in axes}
        )
    for page in pages if name else []:
        views.show_page(page["option"], page["name"], page["page"], page["options"])


def _page(option: str, name: str, module: Any, entry: str) -> dict[str, Any]:
    from .core import plugins

    page = (module.__doc__ or "").strip()
    defaults = plugins.option_defaults(getattr(module, entry))
    return {"option": option, "name": name, "summary": plugins.summary(module), "page": page, "options": defaults}


def _check_fold(kv_heads: str | None, plan: Path | None, group: str | None, merge: str | None) -> None:
    """The options of fold that exclude each other."""
    if (kv_heads is None) == (plan is None):
        given = "none" if plan is None else "both"
        raise UserError(f"fold: expected either --kv-heads N or --plan PLAN.json, got {given}; give one")
    refused = [option for option, value in (("--group", group), ("--merge", merge)) if value is not None]
    if plan is not None and refused:
        raise UserError(
            f"fold: {' and '.join(refused)} beside --plan {plan}; the plan decides, leave them out or make another plan"
        )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user wrote; the others keep the defaults of the functions."""
    return {name: value for name, value in options.items() if value is not None}


def _answer(facts: Mapping[str, Any], as_json: bool) -> bool:
    """Print the machines' form if it was asked for, and say whether."""
    if as_json:
        print(json.dumps(_finite(facts), default=str))
    return as_json


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        if leaving.code == 130:
            print("headfold: interrupted", file=sys.stderr)
        raise
    except (UserError, OSError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        print(f"headfold: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
