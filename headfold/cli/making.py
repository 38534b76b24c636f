"""Verbs that write: calibrate, plan, fold, export, route."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UserError
from ..report import views
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
    Heal,
    HealTokens,
    Items,
    Json,
    KvBudget,
    KvBytes,
    KvHeads,
    Layout,
    MaxLossIncrease,
    Merge,
    Model,
    Refit,
    Route,
    Seed,
    Sensitivity,
    Spread,
    StatsFile,
    Tokens,
    Tp,
    Workers,
)


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
    from .. import recipe
    from ..recipe.following import led

    chosen = given(calibration=calibration, tokens=tokens, items=items, columns=names(columns), context=context)
    with ProgressReport(silent=as_json) as progress:
        result = led(recipe.calibrate)(model, stats, seed=seed, force=force, progress=progress, **chosen)
    answer(result.to_json(), as_json) or views.show_calibration(result)


def plan(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="PLAN.json", help="The file to write.")],
    kv_heads: KvHeads = None,
    kv_budget: KvBudget = None,
    kv_bytes: KvBytes = None,
    max_loss_increase: MaxLossIncrease = None,
    head_dim_multiple: HeadDimMultiple = None,
    allowed: Allowed = None,
    tp: Tp = 1,
    spread: Spread = "exact",
    sensitivity: Sensitivity = None,
    refit: Refit = True,
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
    """Decide which heads share one, and predict the loss.

    With --kv-heads every layer keeps as many K/V heads. With --kv-budget, --kv-bytes or --max-loss-increase layers get counts of their own: each is
    folded alone on a little of the calibration data to see what that costs, and the best spread of the budget is found exactly.
    Counts split the heads equally, as engines take them; with --group swap:unequal=true groups differ in size and any count may be used."""
    from .. import recipe
    from ..recipe.price import serving_costs

    chosen = given(
        kv_heads=kv_heads, kv_budget=kv_budget, kv_bytes=kv_bytes, max_loss_increase=max_loss_increase, sensitivity=sensitivity, group=group,
        merge=merge, stats=stats, allowed=allowed and counts("--allowed", allowed), head_dim_multiple=head_dim_multiple,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        made = recipe.plan(
            model, out, tp=tp, spread=spread, refit=refit, encoder=encoder, seed=seed, workers=workers, force=force, progress=progress,
            **chosen,
        )  # fmt: skip
    if not answer(made.to_json(), as_json):
        views.show_plan(made, serving_costs(model, made, encoder))
        print(f"wrote {out}")


def fold(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    kv_heads: KvHeads = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="PLAN.json", help="What headfold plan wrote.")] = None,
    head_dim_multiple: HeadDimMultiple = None,
    group: Group = None,
    merge: Merge = None,
    refit: Refit = True,
    heal: Heal = False,
    heal_tokens: HealTokens = None,
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
    _check_fold(kv_heads, plan, group, merge, head_dim_multiple)
    from .. import recipe
    from ..recipe.following import led

    chosen = given(
        kv_heads=kv_heads, plan=plan, group=group, merge=merge, calibration=calibration, tokens=tokens, items=items,
        columns=names(columns), context=context, stats=stats, layout=layout, head_dim_multiple=head_dim_multiple, heal_tokens=heal_tokens,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        result = led(recipe.fold)(
            model,
            out,
            refit=refit,
            heal=heal,
            encoder=encoder,
            seed=seed,
            force=force,
            verify=verify,
            progress=progress,
            **chosen,
        )
    answer(result.to_json(), as_json) or views.show_fold(result)


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
    from ..recipe import exporting

    with ProgressReport(silent=as_json) as progress:
        result = exporting.export(folded, out, layout=layout, force=force, verify=verify, progress=progress)
    answer(result.to_json(), as_json) or exporting.show(result)


def route(
    folded: Annotated[Path, typer.Argument(metavar="FOLDED", help="A checkpoint with grouped K/V heads.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    route: Route = "kdgqa",
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
    """Divide query heads among K/V heads by the norms of keys.

    The route measures the keys on calibration data and fixes who reads what: groups of different sizes, the same weights and cache. OUT
    is opened again and compared with the routed model."""
    from ..recipe import routing

    chosen = given(calibration=calibration, tokens=tokens, items=items, columns=names(columns), context=context)
    with ProgressReport(silent=as_json) as progress:
        result = routing.route(folded, out, route=route, seed=seed, force=force, progress=progress, **chosen)
    answer(result.to_json(), as_json) or views.show_route(result)


def _check_fold(
    kv_heads: str | None, plan: Path | None, group: str | None, merge: str | None, head_dim_multiple: str | None
) -> None:
    """The options of fold that exclude each other."""
    if (kv_heads is None) == (plan is None):
        given = "none" if plan is None else "both"
        raise UserError(f"fold: expected either --kv-heads N or --plan PLAN.json, got {given}; give one")
    decided = {"--group": group, "--merge": merge, "--head-dim-multiple": head_dim_multiple}
    refused = [option for option, value in decided.items() if value is not None]
    if plan is not None and refused:
        raise UserError(
            f"fold: {' and '.join(refused)} beside --plan {plan}; the plan decides, leave them out or make another plan"
        )
