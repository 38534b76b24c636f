"""Decide who shares: a plan from headers, weights and statistics."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import planning
from ..budget import total
from ..checkpoint.staging import write_json
from ..checkpoint.stats_file import StatsFile
from ..core.errors import UserError
from ..core.plan import Plan
from .config import config_of, refuse_mixed
from .measuring import CalibrationData, Teacher, default_device
from .source import Progress, Source, open_source, open_stats, refuse_existing, silent
from .spreading import Curves, choose, curves, refuse_unreachable
from .widths import possible, widest
from .wish import BudgetRequest


def plan(
    model: str | Path,
    out: str | Path | None = None,
    *,
    kv_heads: str | int | None = None,
    kv_budget: str | None = None,
    kv_bytes: str | None = None,
    max_loss_increase: float | None = None,
    head_dim_multiple: str | int = 1,
    allowed: Sequence[int] = (),
    tp: int = 1,
    spread: str = "exact",
    sensitivity: str | Path | None = None,
    refit: bool = True,
    group: str = "swap",
    merge: str = "absorb",
    stats: str | Path | None = None,
    encoder: bool = False,
    seed: int = 0,
    workers: int = 1,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Decide which K/V heads share one and predict the loss; writes the plan to `out` if one is given.

    Either every site gets `kv_heads`, or a budget is spread over them: `kv_budget` (a share of the source's K/V bytes), `kv_bytes` (per
    token), or `max_loss_increase` (predicted loss in nats). Then the original runs on a little of its calibration data, each site folded alone (and
    with `refit` refitted, as `fold` will), to put the layers' losses on one scale; what was measured lies in the file `sensitivity`
    (default: beside `out`) and is used again.
    `head_dim_multiple` makes K/V heads that many times as wide as the source's, and as many times fewer, in the same cache; `auto` chooses.
    `allowed` counts, multiples of `tp`, may be used: of those that split the heads equally or, with a `group` whose groups may differ
    in size (`swap:unequal=true`), of all. `spread` is exact, or QCQA's second stage. An encoder-decoder's encoder stays as it is
    unless `encoder` is true.

    Raises:
        UserError: see `open_source`, `parse_kv_heads`, `BudgetRequest`; a method that needs statistics without `stats`.
    """
    wish = BudgetRequest(
        kv_budget, kv_bytes, max_loss_increase, tuple(allowed), tp, spread, unequal=planning.parse_group(group).unequal
    )
    wish.check()
    budgeted = (kv_budget, kv_bytes, max_loss_increase) != (None, None, None)
    if budgeted == (kv_heads is not None):
        given = "both" if budgeted else "none"
        raise UserError(
            f"plan: expected --kv-heads, or --kv-budget, --kv-bytes or --max-loss-increase; got {given}; give one"
        )
    if not budgeted and (allowed or tp != 1 or spread != "exact" or sensitivity is not None):
        raise UserError(
            "plan: --allowed, --tp, --spread and --sensitivity go with a budget, not with --kv-heads; leave them out"
        )
    if out is not None:
        refuse_existing(Path(out), force)
    source = open_source(model, encoder)
    given_stats, progress = open_stats(stats, source), progress or silent
    widths = possible(source, head_dim_multiple, group, merge)
    if budgeted:
        refuse_mixed(source)
        path = Path(sensitivity or beside(Path(out or source.checkpoint.path.name)))
        made = _within_budget(
            source, wish, widths, group, merge, given_stats, seed, path, workers, device, progress, refit
        )
    else:
        width = widest(source, widths, kv_heads, group)
        made = plan_source(source, kv_heads, group, merge, given_stats, seed, progress, width, workers)
    config_of(source, made)  # refuses what could not be written
    if out is not None:
        write_json(Path(out), made.to_json())
    return made


def _within_budget(
    source: Source,
    wish: BudgetRequest,
    widths: Sequence[int],
    group: str,
    merge: str,
    stats: StatsFile | None,
    seed: int,
    sensitivity: Path,
    workers: int,
    device: str | None,
    progress: Progress,
    refit: bool,
) -> Plan:
    """The best spread at the width that loses least or, where the loss is given, takes fewest bytes."""
    best: tuple[float, Plan] | None = None
    refusal: UserError | None = None
    for width in widths:
        asked = replace(wish, head_dim_multiple=width)
        try:
            refuse_unreachable(source, asked)
        except UserError as error:  # no count left at this width, or none small enough
            refusal = refusal or error
            continue
        path = of_width(sensitivity, width)
        found, run = budget_curves(source, asked, group, merge, stats, seed, path, workers, device, progress, refit)
        run.close()
        try:
            counts = choose(found, asked)
        except UserError as error:
            refusal = refusal or error
            continue
        reached = total(found.options, counts)
        value = reached.loss if wish.max_loss_increase is None else reached.kv_bytes
        if best is None or value < best[0]:
            best = value, found.plan(counts)
    if best is None:
        assert refusal is not None
        raise refusal
    return best[1]


def of_width(sensitivity: Path, head_dim_multiple: int) -> Path:
    """The file of sensitivities of heads of this width."""
    return (
        sensitivity
        if head_dim_multiple == 1
        else sensitivity.with_suffix(f".width-{head_dim_multiple}{sensitivity.suffix}")
    )


def beside(out: Path) -> Path:
    """Where measured sensitivities lie if no file is named."""
    return out.with_name(f"{out.name.removesuffix('.json')}.sensitivity.json")


def require_statistics(stats: StatsFile | None) -> None:
    """Raises: UserError without any."""
    if stats is None:
        raise UserError("plan: a budget is spread by predicted losses: run headfold calibrate and pass --stats")


def budget_curves(
    source: Source,
    wish: BudgetRequest,
    group: str,
    merge: str,
    stats: StatsFile | None,
    seed: int,
    sensitivity: Path,
    workers: int,
    device: str | None,
    progress: Progress,
    refit: bool = True,
) -> tuple[Curves, Teacher]:
    """Curves of every site, and the running original that they were measured on.

    Raises:
        UserError: no statistics, which losses are predicted from.
    """
    require_statistics(stats)
    said = stats.metadata
    kind = CalibrationData.chosen(
        source, said.get("source"), int(said.get("tokens", 0)) or None, int(said.get("tokens", 0)) or None,
        tuple(filter(None, said.get("columns", "").split(","))), None, int(said.get("seed", 0)),
    )  # fmt: skip
    run = Teacher(source, kind, device or default_device(), progress)
    run.use_sample(stats)
    made = curves(source, wish, group, merge, stats, seed, run, sensitivity, workers, progress, refitting=refit)
    return made, run


def plan_source(
    source: Source,
    kv_heads: str | int,
    group: str,
    merge: str,
    stats: StatsFile | None,
    seed: int,
    progress: Progress,
    head_dim_multiple: int = 1,
    workers: int = 1,
) -> Plan:
    """One count of K/V heads, or share, for all sites."""
    if stats is None and needs_statistics(group, merge):
        raise UserError(
            f"--group {group} --merge {merge} need calibration statistics: run headfold calibrate and pass --stats, "
            "or choose --group contiguous --merge mean"
        )
    names = [site.name for site in source.sites]
    return planning.make_plan(
        source.sites,
        source.checkpoint.read,
        kv_heads,
        source=source.checkpoint.fingerprint(),
        group=group,
        merge=merge,
        stats=stats,
        calibration=None if stats is None else stats.metadata,
        seed=seed,
        head_dim_multiple=head_dim_multiple,
        workers=workers,
        progress=lambda name: progress("plan", names.index(name), len(names)),
    )


def needs_statistics(group: str, merge: str) -> bool:
    """Whether a method asks for statistics. A grouping cost mostly does: without data it would group by weights alone, unasked."""
    return bool(planning.statistics_needed(group, merge))
