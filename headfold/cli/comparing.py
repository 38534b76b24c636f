"""Verbs that put methods and budgets side by side: frontier, compare."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UserError
from ..report import comparisons
from ..report.progress import ProgressReport
from .answers import answer, counts, given, names
from .options import (
    Allowed,
    Calibration,
    Columns,
    Context,
    Debug,
    Encoder,
    Force,
    Group,
    HeadDimMultiple,
    Items,
    Json,
    Merge,
    Model,
    Refit,
    Seed,
    Sensitivity,
    StatsFile,
    Tokens,
    Tp,
    Workers,
)


def frontier(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.")],
    head_dim_multiple: HeadDimMultiple = None,
    allowed: Allowed = None,
    tp: Tp = 1,
    sensitivity: Sensitivity = None,
    refit: Refit = True,
    measure: Annotated[
        int,
        typer.Option(
            "--measure", metavar="N", min=0, help="Points to fold in memory and measure; the others are predicted."
        ),
    ] = 5,
    group: Group = None,
    merge: Merge = None,
    stats: StatsFile = None,
    encoder: Encoder = False,
    seed: Seed = 0,
    workers: Workers = 1,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what each size of the K/V cache costs.

    Writes the Pareto front of K/V bytes against loss: frontier.json, a plan for every point (headfold fold --plan makes it), and a
    picture."""
    from ..recipe.frontier import frontier as find

    chosen = given(
        allowed=allowed and counts("--allowed", allowed), sensitivity=sensitivity, group=group, merge=merge, stats=stats,
        head_dim_multiple=head_dim_multiple,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        found = find(
            model, out, tp=tp, measured=measure, refit=refit, encoder=encoder, seed=seed, workers=workers, force=force, progress=progress,
            **chosen,
        )  # fmt: skip
    answer(found.to_json(), as_json) or comparisons.show_frontier(found)


def compare(
    model: Model,
    kv_heads: Annotated[
        str | None, typer.Option("--kv-heads", metavar="N,N", help="Counts of K/V heads, or shares: 4,2,1 or 1/2,1/4.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAME,NAME",
            help="Of mean, first, random, procrustes, procrustes+norm, qcqa-ec, qcqa-ac, asymgqa, asymgqa-unequal, absorb, "
            "absorb-unequal (groups of several sizes) and absorb-wide (heads of twice the width in the same cache), each but random "
            "also with +refit. Default: all.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where rows are kept, to go on. Default: MODEL.compare")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="SOURCE", help="What to measure on, as in headfold eval.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Items to measure on; tokens of plain text.")
    ] = None,
    calibration: Calibration = None,
    tokens: Tokens = None,
    items: Items = None,
    columns: Columns = None,
    context: Context = None,
    stats: StatsFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw what is lost against the K/V cache.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold by every method, and show what each loses.

    Calibrates once, folds MODEL by every method to every count of K/V heads, measures each beside the original, and prints one table.
    Rows that
    were computed before are kept: run the same command again to go on."""
    from ..recipe.comparing import compare as run
    from ..recipe.source import refuse_existing
    from ..report.plot import require_plot

    if kv_heads is None:
        raise UserError("compare: expected --kv-heads N,N, counts such as 4,2,1 or shares such as 1/2,1/4; got none")
    if plot is not None:
        require_plot(plot)
        refuse_existing(plot, force)
    chosen = given(
        methods=names(methods), out=out, text=text, limit=limit, calibration=calibration, tokens=tokens, items=items,
        columns=names(columns), context=context, stats=stats,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        found = run(model, names(kv_heads), seed=seed, force=force, progress=progress, **chosen)
    if not answer(found.to_json(), as_json):
        comparisons.show_comparison(found)
    else:
        for what, reason in found.skipped.items():
            print(f"left out: {what}: {reason}", file=sys.stderr)
    if plot is not None:
        comparisons.plot_comparison(plot, found)
