"""Find the loss increase of each size of the K/V cache: the Pareto front of bytes against loss, with a plan per point."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..budget.curves import CurveRequest, loss_curves, require_statistics, teacher_of_statistics
from ..budget.frontier import Point, front_points, rank_correlation, site_rank_correlation, undominated
from ..budget.points import is_unfinished, read_front, unfinished, write_points
from ..budget.request import BudgetRequest
from ..budget.sensitivity_file import path_of_multiple
from ..checkpoint.ownership import refuse_contents
from ..conversion.source import open_source, open_stats
from ..core.plan import Plan
from ..core.progress import Progress, no_progress
from ..head_dims import possible_multiples
from ..hf_models import check_device, dtype_named
from ..outputs import owned_directory
from ..pages.contents import Front
from ..pages.writing import front_page
from ..parallel import on_all, on_main, on_main_only, spmd
from ..planning import parse_group
from ..reports.plot import require_plot

NUM_MEASURED = 5


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points, from fewest bytes to most, and the rank correlations of predictions with measurements."""

    points: list[Point]
    rank_correlation: float | None
    """Spearman's, of predicted and measured losses at the points that were measured."""
    site_rank_correlation: float | None
    """Spearman's, of predicted relative errors and measured loss increases of single sites."""
    directory: str
    page: str = ""
    """A line on the page that was written beside the points, or why there is none."""

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {name: value for name, value in asdict(self).items() if name != "page"}


@spmd
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
    measured: int = NUM_MEASURED,
    adapter: str | Path | None = None,
    seed: int = 0,
    workers: int = 1,
    force: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Write frontier.json, frontier.png, a page (report.html) and a plan per point into the directory `out`.

    The points are the best allocations of several budgets, and for comparison one count everywhere. `headfold fold --plan` makes any of
    them.

    Args:
        model: A checkpoint directory, a GGUF file or a hub id.
        out: The directory to write.
        head_dim_multiple: With "auto", points of all multiples that attention kernels take compete.
        allowed: Counts of K/V heads that may be used.
        tp: Devices of tensor parallelism, of which all counts are multiples.
        group: Grouping method with its options.
        merge: Merge method with its options.
        stats: A file that `headfold.calibrate` wrote; needed.
        sensitivity: The file of measured sensitivities; by default in `out`.
        refit: Refit what is folded in memory, as fold will.
        measured: Points to fold in memory and measure, beside the uniform ones; the others are predicted.
        adapter: A LoRA adapter of peft that is merged into the model first.
        seed: Seed of everything drawn at random.
        workers: Sites that are grouped side by side, in threads.
        force: Replace what an earlier frontier wrote to `out`.
        device: "cpu" or "cuda".
        dtype: What the original computes in, such as "float32".
        progress: Called with (stage, done, total).

    Raises:
        UserError: as `headfold.plan`; a directory in the way without `force`; matplotlib is not installed.
    """
    directory, progress = Path(out), progress or no_progress
    place, compute_dtype = check_device(device), dtype_named(dtype)
    require_plot(directory / "frontier.png", "headfold frontier")
    with owned_directory(directory):
        if not is_unfinished(directory):
            on_main(lambda: refuse_contents(directory, force))
        source = on_all(lambda: open_source(model, adapter=adapter, progress=progress))
        given = on_main_only(lambda: open_stats(stats, source))
        multiples = possible_multiples(source.sites, head_dim_multiple, group, merge)
        on_main(lambda: require_statistics(given))
        budget = BudgetRequest(allowed=tuple(allowed), tp=tp, unequal=parse_group(group).unequal)
        replace(budget, head_dim_multiple=multiples[0]).check_reachable(source)
        teacher = teacher_of_statistics(source, given, place, compute_dtype, progress)
        request = CurveRequest(group, merge, refit, seed, workers)
        with unfinished(directory):
            found: list[tuple[Point, Plan]] = []
            correlation: float | None = None
            for multiple in multiples:
                at_multiple, first = replace(budget, head_dim_multiple=multiple), multiple == multiples[0]
                if not first and not at_multiple.is_reachable(source):
                    continue
                path = path_of_multiple(Path(sensitivity or directory / "sensitivity.json"), multiple)
                curves = loss_curves(teacher, at_multiple, request, given, path)
                correlation = site_rank_correlation(curves) if first else correlation
                found += front_points(teacher, at_multiple, curves, given, measured, uniform=first)
            points = undominated([point for point, _ in found])
            both = [(point.predicted, point.measured) for point in points if point.measured is not None]
            result = Frontier(points, rank_correlation(both), correlation, str(directory))
            title = f"{Path(str(model)).name}, {group}, {merge}{'' if refit else ', no refit'}"
            on_main(
                lambda: write_points(
                    directory, result.to_json(), points, {point.plan: plan for point, plan in found}, title
                )
            )
            name = directory.resolve().name
            page = on_main(lambda: front_page(directory, lambda: Front(name, str(directory), *read_front(directory))))
    return replace(result, page=page)
