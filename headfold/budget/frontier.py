"""Points of the Pareto front of K/V bytes against loss: a plan each, predicted at all of them and measured at some."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..conversion.folded_config import can_be_written
from ..conversion.serving_cost import serving_cost
from ..conversion.teacher import Teacher
from ..core.plan import Plan
from ..evaluate.sensitivity import Divergence
from ..stats_file import StatsFile
from .allocation import Allocation, pareto_front, total
from .curves import Curves, predicted_error
from .in_memory import folded_in_memory, last_part
from .request import BudgetRequest


@dataclass(frozen=True, slots=True)
class Point:
    """One allocation of K/V heads. Losses are those of `evaluate.sensitivity`: KL in nats for models with logits."""

    plan: str
    """File name of the plan, beside frontier.json."""
    kv_bytes_per_token: int
    num_kv_heads: dict[str, int]
    predicted: float
    measured: float | None
    """Loss increase on the calibration data that single sites were measured on; None where it was not measured."""
    uniform: bool
    """Whether every site has the same count, as --kv-heads gives."""
    head_dim_multiple: int = 1
    weight_bytes: int = 0
    """Bytes of the attention weights (`conversion.serving_cost.ServingCost`); larger head dims take more."""


def front_points(
    teacher: Teacher,
    budget: BudgetRequest,
    curves: Curves,
    stats: StatsFile | None,
    num_measured: int,
    *,
    uniform: bool,
) -> list[tuple[Point, Plan]]:
    """Return the front at one head_dim multiple with its plans; with `uniform` also what one count everywhere gives.

    `num_measured` points of the front, and all uniform ones, are folded in memory and measured.
    """
    source, model = teacher.source, teacher.model
    best = pareto_front(curves.options)
    counts_of = budget.counts(source.sites[0]) if uniform else []
    equal = [counts for n in counts_of if (counts := _uniform(curves, n)) is not None]
    chosen = _evenly_spaced(best, num_measured) + equal
    increase = Divergence(model, last_part(teacher.sample)) if num_measured else None
    found: list[tuple[Point, Plan]] = []
    every = [*best, *(one for one in equal if one not in best)]
    for number, counts in enumerate(every):
        teacher.progress("frontier", number, len(every))
        plan = curves.plan(counts)
        if not can_be_written(source, plan):
            continue
        measured = None
        if increase is not None and counts in chosen:
            with folded_in_memory(teacher, source.sites, plan, stats, refitted=curves.request.refit):
                measured = increase()
        sums = total(curves.options, counts)
        multiple, is_uniform = budget.head_dim_multiple, counts in equal
        name = f"plan-{sums.kv_bytes}{f'-x{multiple}' if multiple > 1 else ''}{'-uniform' if is_uniform else ''}.json"
        weights = serving_cost(source, plan).weight_bytes
        point = Point(name, sums.kv_bytes, dict(counts), sums.loss_increase, measured, is_uniform, multiple, weights)
        found.append((point, plan))
    return found


def undominated(points: Sequence[Point]) -> list[Point]:
    """Return the points by bytes, without those that another one beats; of equal ones the smallest head_dim. Uniform points stay."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kv_bytes_per_token, p.predicted, p.head_dim_multiple)):
        if point.uniform or not any(other.predicted <= point.predicted for other in kept if not other.uniform):
            kept.append(point)
    return sorted(kept, key=lambda point: (point.kv_bytes_per_token, point.uniform))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's correlation; None for fewer than three pairs."""
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None


def site_rank_correlation(curves: Curves) -> float | None:
    """Return the rank correlation of predicted errors and measured loss increases of single sites."""
    return rank_correlation(
        [
            (predicted_error(choice, count), increase)
            for choice in curves.choices
            for count, increase in curves.measured[choice.sites[0].name].items()
        ]
    )


def _uniform(curves: Curves, count: int) -> Allocation | None:
    """Return the same count everywhere, where every site can have it."""
    possible = all(count in {option.num_kv_heads for option in listed} for listed in curves.options.values())
    return {name: count for name in curves.options} if possible else None


def _evenly_spaced(allocations: list[Allocation], number: int) -> list[Allocation]:
    if len(allocations) <= number or not number:
        return list(allocations) if number else []
    places = torch.linspace(0, len(allocations) - 1, number).round().int().tolist()
    return [allocations[place] for place in sorted(set(places))]
