"""The Pareto front of K/V bytes against loss: a plan per point, predicted at all of them and measured at some."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..budget import Spread, total
from ..budget import frontier as best_spreads
from ..checkpoint.staging import write_json
from ..checkpoint.stats_file import StatsFile
from ..core.errors import UserError
from ..core.plan import Plan
from ..evaluate.sensitivity import Divergence
from ..planning import parse_group
from ..report.plot import plot_frontier, require_plot
from .config import config_of
from .deciding import budget_curves, of_width, require_statistics
from .measuring import Teacher
from .price import price
from .source import Progress, Source, open_source, open_stats, silent
from .spreading import Curves, few, folded_in_memory, predicted_error, refitted, refuse_unreachable
from .widths import possible
from .wish import BudgetRequest

MEASURED = 5


@dataclass(frozen=True, slots=True)
class Point:
    """One spread of K/V heads. Losses are damages as `evaluate.sensitivity.Divergence` has them: KL in nats for models with logits."""

    plan: str
    """File name, beside frontier.json."""
    kv_bytes_per_token: int
    kv_heads: dict[str, int]
    predicted: float
    measured: float | None
    """On the calibration data that single layers were measured on; with refit unless it was left out."""
    uniform: bool
    """Whether every layer has the same count: what --kv-heads gives."""
    head_dim_multiple: int = 1
    """Of K/V heads, in heads of the source."""
    weight_bytes: int = 0
    """Of attention (`recipe.price.ServingCost`), which wide heads enlarge."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points, from fewest bytes to most, and how well predictions order what was measured."""

    points: list[Point]
    rank_correlation: float | None
    """Spearman's, of predicted and measured losses at the points that were measured."""
    site_rank_correlation: float | None
    """Spearman's, of the predicted relative errors and the measured damages of single sites: what predictions are worth as they stand."""
    directory: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def frontier(
    model: str | Path,
    out: str | Path,
    *,
    head_dim_multiple: str | int = 1,
    allowed: Sequence[int] = (),
    tp: int = 1,
    group: str = "swap",
    merge: str = "absorb",
    stats: str | Path | None = None,
    sensitivity: str | Path | None = None,
    refit: bool = True,
    measured: int = MEASURED,
    encoder: bool = False,
    seed: int = 0,
    workers: int = 1,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Write frontier.json, frontier.png and a plan per point into the directory `out`.

    Beside the best spreads stand those of one count everywhere. These, and `measured` others, are folded in memory (and with
    `refit` refitted on a little data) and measured. `headfold fold --plan` makes any of them. With `head_dim_multiple` `auto` the points of all
    widths that kernels take compete.

    Raises:
        UserError: see `recipe.plan`; a directory in the way without `force`; matplotlib is not installed.
    """
    directory, progress = Path(out), progress or silent
    require_plot(directory / "frontier.png", "headfold frontier")
    if directory.exists() and any(directory.iterdir()) and not force:
        raise UserError(
            f"{directory}: expected nothing there, got files; choose another or pass --force to replace them"
        )
    source = open_source(model, encoder)
    given = open_stats(stats, source)
    widths = possible(source, head_dim_multiple, group, merge)
    require_statistics(given)
    asked = BudgetRequest(allowed=tuple(allowed), tp=tp, unequal=parse_group(group).unequal)
    refuse_unreachable(source, replace(asked, head_dim_multiple=widths[0]))
    directory.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    plans: dict[str, Plan] = {}
    correlation: float | None = None
    for width in widths:
        wish = replace(asked, head_dim_multiple=width)
        if width > widths[0] and not _is_reachable(source, wish):
            continue
        path = of_width(Path(sensitivity or directory / "sensitivity.json"), width)
        found, run = budget_curves(source, wish, group, merge, given, seed, path, workers, device, progress, refit)
        first = width == widths[0]
        correlation = site_correlation(found) if first else correlation
        points += _points(plans, source, wish, found, run, given, measured, refit, uniform=first, progress=progress)
        run.close()
    points = _undominated(points)
    both = [(point.predicted, point.measured) for point in points if point.measured is not None]
    result = Frontier(points, rank_correlation(both), correlation, str(directory))
    for left in _plans_of(directory / "frontier.json"):  # of an earlier front, which --force gave up
        (directory / left).unlink(missing_ok=True)
    for point in points:
        write_json(directory / point.plan, plans[point.plan].to_json())
    write_json(directory / "frontier.json", result.to_json())
    plot_frontier(
        directory / "frontier.png",
        points,
        title=f"{Path(str(model)).name}, {group}, {merge}{'' if refit else ', no refit'}",
    )
    return result


def _plans_of(earlier: Path) -> list[str]:
    """File names of the plans that an earlier frontier.json lists; what else lies there is the user's."""
    try:
        names = [str(point["plan"]) for point in json.loads(earlier.read_text())["points"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if re.fullmatch(r"plan-\d+[a-z0-9-]*\.json", name)]


def _is_reachable(source: Source, wish: BudgetRequest) -> bool:
    """Whether every site has a count at this width."""
    try:
        refuse_unreachable(source, wish)
    except UserError:
        return False
    return True


def _points(
    plans: dict[str, Plan],
    source: Source,
    wish: BudgetRequest,
    found: Curves,
    run: Teacher,
    stats: StatsFile | None,
    measured: int,
    refit: bool,
    *,
    uniform: bool,
    progress: Progress,
) -> list[Point]:
    """The front at one width, and with `uniform` what one count everywhere gives; notes the plans by file name."""
    best = best_spreads(found.options)
    counts_of = wish.counts(source.sites[0]) if uniform else []
    equal = [counts for n in counts_of if (counts := _uniform(found, n)) is not None]
    chosen = _spaced(best, measured) + equal
    damage = Divergence(run.model, few(run.sample, last=True)) if measured else None
    points: list[Point] = []
    every = [*best, *(one for one in equal if one not in best)]
    for number, counts in enumerate(every):
        progress("frontier", number, len(every))
        made = found.plan(counts)
        if not _can_be_written(source, made):
            continue
        lost = None
        if damage is not None and counts in chosen:
            refits = refitted(source.sites, made, source, stats, run.model, few(run.sample)) if refit else None
            with folded_in_memory(run.model, source.sites, made, source, stats, refits):
                lost = damage()
        sums = total(found.options, counts)
        wide = f"-width-{wish.head_dim_multiple}" if wish.head_dim_multiple > 1 else ""
        name = f"plan-{sums.kv_bytes}{wide}{'-uniform' if counts in equal else ''}.json"
        plans[name] = made
        weights = price(source, made).weight_bytes
        points.append(
            Point(name, sums.kv_bytes, dict(counts), sums.loss, lost, counts in equal, wish.head_dim_multiple, weights)
        )
    return points


def _can_be_written(source: Source, plan: Plan) -> bool:
    """Not where q, k and v are one tensor on disk, which has one count of K/V heads."""
    try:
        config_of(source, plan)
    except UserError:
        return False
    return True


def _undominated(points: list[Point]) -> list[Point]:
    """By bytes; without those that another point beats, of equal ones the narrowest. One count everywhere stays, for comparison."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kv_bytes_per_token, p.predicted, p.head_dim_multiple)):
        if point.uniform or not any(other.predicted <= point.predicted for other in kept if not other.uniform):
            kept.append(point)
    return sorted(kept, key=lambda point: (point.kv_bytes_per_token, point.uniform))


def _uniform(found: Curves, count: int) -> Spread | None:
    """The same count everywhere, where every site can have it."""
    spread = {name: count for name in found.options}
    possible = all(count in {option.kv_heads for option in listed} for listed in found.options.values())
    return spread if possible else None


def _spaced(spreads: list[Spread], number: int) -> list[Spread]:
    if len(spreads) <= number or not number:
        return list(spreads) if number else []
    places = torch.linspace(0, len(spreads) - 1, number).round().int().tolist()
    return [spreads[place] for place in sorted(set(places))]


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's; None of fewer than three pairs."""
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None


def site_correlation(found: Curves) -> float | None:
    return rank_correlation(
        [
            (predicted_error(choice, count), lost)
            for choice in found.choices
            for count, lost in found.measured[choice.sites[0].name].items()
        ]
    )
