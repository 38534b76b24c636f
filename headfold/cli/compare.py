"""headfold compare."""

import sys
from pathlib import Path
from typing import Annotated

from ..core.errors import UserError
from ..parallel import is_main
from .options import (
    DATA,
    HOW,
    OUTPUT,
    WHAT,
    Adapter,
    Calibration,
    Columns,
    Context,
    Debug,
    Device,
    Dtype,
    Force,
    Items,
    Json,
    Model,
    Seed,
    StatsFile,
    Tokens,
    TrustRemoteCode,
    option,
)  # fmt: skip
from .output import answered, given, names

EXAMPLES = (
    "headfold compare my-model --kv-heads 1/2,1/4 --text notes.txt",
    "headfold compare my-model --kv-heads 4 --methods absorb+refit,mean --plot methods.png",
)


def compare(
    model: Model,
    kv_heads: Annotated[
        str | None,
        option("--kv-heads", panel=WHAT, metavar="N,N", help="Counts of K/V heads, or shares: 4,2,1 or 1/2,1/4."),
    ] = None,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    methods: Annotated[
        str | None,
        option(
            "--methods", panel=HOW, metavar="NAME,NAME",
            help="Methods: mean, first, random, procrustes, procrustes+norm, qcqa-ec, qcqa-ac, asymgqa, asymgqa-unequal, absorb, "
            "absorb-unequal (groups of several sizes) and absorb-wide (twice the head_dim in the same cache), each but random "
            "also with +refit. Default: all.",
        ),
    ] = None,
    seed: Seed = 0,
    text: Annotated[
        str | None, option("--text", panel=DATA, metavar="SOURCE", help="Data to measure on, as in headfold eval.")
    ] = None,
    limit: Annotated[
        int | None, option("--limit", panel=DATA, metavar="N", min=1, help="Items to measure on; tokens of plain text.")
    ] = None,
    calibration: Calibration = None,
    tokens: Tokens = None,
    items: Items = None,
    columns: Columns = None,
    context: Context = None,
    stats: StatsFile = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path | None,
        option("--out", panel=OUTPUT, metavar="DIR", help="Directory that keeps the rows, to resume from. Default: MODEL.compare"),
    ] = None,
    plot: Annotated[
        Path | None, option("--plot", panel=OUTPUT, metavar="FILE.png", help="Draw the loss increase against the K/V cache.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Fold by every method, and compare the loss increases.

    Calibrates once, folds MODEL by every method to every count of K/V heads, measures each beside the original, prints one table,
    and with the extra report writes a page to look at. Rows that were computed before are kept: run the same command again to resume."""
    from ..outputs import refuse_existing
    from ..reports import comparisons
    from ..reports.plot import require_plot
    from ..reports.progress import ProgressReport
    from ..verbs import compare as verb

    if kv_heads is None:
        raise UserError("compare: expected --kv-heads N,N, counts such as 4,2,1 or shares such as 1/2,1/4; got none")
    if plot is not None:
        require_plot(plot)
        refuse_existing(plot, force)
    chosen = given(
        methods=names(methods), out=out, text=text, limit=limit, calibration=calibration, tokens=tokens, items=items,
        columns=names(columns), context=context, stats=stats, adapter=adapter,
    )  # fmt: skip
    with ProgressReport(brief=as_json) as progress:
        found = verb.compare(
            model,
            names(kv_heads) or (),
            seed=seed,
            trust_remote_code=trust_remote_code,
            force=force,
            device=device,
            dtype=dtype,
            progress=progress,
            **chosen,
        )
    if not answered(found.to_json(), as_json):
        comparisons.show_comparison(found)
    elif is_main():
        for what, reason in found.skipped.items():
            print(f"skipped: {what}: {reason}", file=sys.stderr)
    if plot is not None and is_main():
        comparisons.plot_comparison(plot, found)
