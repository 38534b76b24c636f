"""Loss increase against K/V bytes for every site: measured at a few counts, and predicted between them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import planning
from ..conversion.calibration_config import CalibrationConfig, CalibrationRequest
from ..conversion.source import Source
from ..conversion.teacher import Teacher
from ..core.errors import UserError
from ..core.heads import kv_bytes
from ..core.plan import Plan
from ..core.progress import Progress
from ..evaluate.sensitivity import measure_sites_alone
from ..hf_models.streamed import is_streamed
from ..parallel import on_main
from ..planning import Choice
from ..stats_file import StatsFile
from .allocation import Allocation, CountOption, Options, allocate, allocate_qcqa, total
from .in_memory import folded_in_memory, last_part
from .request import BudgetRequest
from .sensitivity_file import Sensitivities, read_sensitivities, write_sensitivities

NUM_MEASURED = 3
"""Counts of a site at which its loss increase is measured; between them it follows the predicted error."""
NUM_MEASURED_UNEQUAL = 5
"""The same where groups may differ in size: more counts lie between, and with three measured ones the loss increase
between the least two is estimated too high, so that heads go to the wrong layers."""

_WITH_LOGITS = (
    "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel", "ForMaskedLM", "Classification", "ForCTC",
)  # fmt: skip
"""Ends of the names of classes whose first output is logits."""


@dataclass(frozen=True, slots=True)
class CurveRequest:
    """The methods by which single sites are folded to be measured."""

    group: str
    merge: str
    refit: bool = True
    """Whether a measured site is refitted, as fold will refit it: that changes which sites lose most."""
    seed: int = 0
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Curves:
    """Cache and loss increase of every choice of heads. `measured` has those of single sites by name and count."""

    source: Source
    choices: Sequence[Choice]
    options: Options
    measured: Sensitivities
    request: CurveRequest
    calibration: Mapping[str, str]

    def plan(self, counts: Mapping[str, int]) -> Plan:
        """Return the plan with these counts, by the first site of each choice, and what it is predicted to lose."""
        chosen = [(choice, counts[choice.sites[0].name]) for choice in self.choices]
        fingerprint = self.source.checkpoint.fingerprint()
        made = planning.assemble(
            self.source.sites, chosen, self.request.group, fingerprint, self.request.seed, self.calibration
        )
        return replace(made, predicted_loss_increase=total(self.options, counts).loss_increase)

    def allocate(self, budget: BudgetRequest) -> Allocation:
        """Return the counts that a budget asks for.

        Raises:
            UserError: it cannot be reached.
        """
        limit = budget.limit(self.source)
        if limit is None:
            return allocate(self.options, max_loss=budget.max_loss_increase)
        if budget.allocation == "qcqa":
            return allocate_qcqa(self.options, limit, seed=self.request.seed)
        return allocate(self.options, max_bytes=limit)


def require_statistics(stats: StatsFile | None) -> None:
    """Refuse a budget without statistics.

    Raises:
        UserError: there are none.
    """
    if stats is None:
        raise UserError(
            "plan: a budget is allocated by measured sensitivities, which need statistics: run headfold calibrate and pass --stats"
        )


def teacher_of_statistics(
    source: Source, stats: StatsFile | None, device: str, dtype: torch.dtype | None, progress: Progress
) -> Teacher:
    """Return the teacher with the calibration data that the statistics were measured on."""
    recorded = on_main(lambda: {} if stats is None else stats.metadata)
    config = CalibrationConfig.resolve(source, CalibrationRequest(), recorded)
    teacher = Teacher(source, config, device, dtype, progress)
    teacher.use_sample(stats)
    return teacher


def loss_curves(
    teacher: Teacher, budget: BudgetRequest, request: CurveRequest, stats: StatsFile | None, path: Path
) -> Curves:
    """Group every site at every count, measure sites alone or read earlier measurements from `path`, and put both together.

    Raises:
        UserError: the file holds other measurements, or the model does not fit into memory.
    """
    source, progress = teacher.source, teacher.progress
    names = [site.name for site in source.sites]
    about = on_main(lambda: _about(teacher, budget, request, stats))
    choices = on_main(lambda: planning.choices(
        source.sites, source.checkpoint.read, lambda site: [*budget.counts(site), site.num_kv_heads],
        grouping=planning.parse_group(request.group), merge=request.merge, stats=stats, seed=request.seed,
        head_dim_multiple=budget.head_dim_multiple, workers=request.workers,
        progress=lambda name: progress("plan", names.index(name), len(names)),
    ))  # fmt: skip
    measured = on_main(lambda: read_sensitivities(path, about))
    number = NUM_MEASURED_UNEQUAL if budget.unequal else NUM_MEASURED
    wanted = {choice.sites[0].name: measured_counts(list(choice.plans)[:-1], number) for choice in choices}
    missing = [(c, n) for c in choices for n in wanted[c.sites[0].name] if n not in measured.get(c.sites[0].name, {})]
    if missing:
        found = _measure(teacher, missing, request, stats)
        measured = {name: {**measured.get(name, {}), **found.get(name, {})} for name in {**measured, **found}}
        on_main(lambda: write_sensitivities(path, about, measured))
    # A file may hold counts of earlier plans; only those of this plan are used, so that every call gives the same curves.
    used = {name: {count: measured[name][count] for count in counts} for name, counts in wanted.items()}
    options = {choice.sites[0].name: _options(choice, source, used[choice.sites[0].name]) for choice in choices}
    return Curves(source, choices, options, used, request, about["stats"])


def _about(teacher: Teacher, budget: BudgetRequest, request: CurveRequest, stats: StatsFile | None) -> dict[str, Any]:
    require_statistics(stats)
    assert stats is not None
    return {
        "source": teacher.source.checkpoint.fingerprint(), "group": request.group, "merge": request.merge, "refit": request.refit,
        "seed": request.seed, "head_dim_multiple": budget.head_dim_multiple, "stats": dict(stats.metadata),
        "dtype": str(teacher.dtype).removeprefix("torch.") if teacher.dtype else None,
    }  # fmt: skip


def measured_counts(counts: Sequence[int], number: int) -> list[int]:
    """Return the least, the greatest and others between, evenly spaced in their logarithms."""
    if len(counts) <= number:
        return list(counts)
    spaced = (counts[0] * (counts[-1] / counts[0]) ** (at / (number - 1)) for at in range(number))
    return sorted({min(counts, key=lambda count: abs(math.log(count / ideal))) for ideal in spaced})


def _measure(
    teacher: Teacher, missing: Sequence[tuple[Choice, int]], request: CurveRequest, stats: StatsFile | None
) -> dict[str, dict[int, float]]:
    """Return the loss increase of each choice alone, on the end of the calibration data; refits see its beginning."""
    if is_streamed(teacher.model):
        raise UserError(
            f"{teacher.source.name}: expected a model that fits into this machine's memory, which sensitivities need; use --kv-heads"
        )

    def change(choice: Choice, count: int) -> AbstractContextManager[None]:
        plans = {site.name: plan for site, plan in zip(choice.sites, choice.plans[count], strict=True)}
        plan = Plan(plans, request.group, "", request.seed)
        return folded_in_memory(teacher, choice.sites, plan, stats, refitted=request.refit)

    changes = {(choice.sites[0].name, count): lambda c=choice, n=count: change(c, n) for choice, count in missing}
    done = iter(range(len(changes)))

    def report(name: str) -> None:
        teacher.progress("sensitivity", next(done), len(changes))

    return measure_sites_alone(teacher.model, last_part(teacher.sample), changes, report)


def loses_nats(config: Mapping[str, Any]) -> bool:
    """Return whether losses of a model of this config.json are in nats: it has logits (`evaluate.sensitivity.Divergence`)."""
    return next(iter(config.get("architectures") or []), "").endswith(_WITH_LOGITS)


def _options(choice: Choice, source: Source, measured: Mapping[int, float]) -> list[CountOption]:
    predicted = {count: predicted_error(choice, count) for count in choice.plans}
    itemsize = source.dtype.itemsize
    return [
        CountOption(
            count,
            sum(kv_bytes(count, site.head_dim, itemsize) for site in choice.sites),
            max(0.0, interpolated_loss(count, predicted, measured)),
        )
        for count in choice.plans
    ]


def predicted_error(choice: Choice, count: int) -> float:
    """Return the relative errors of K and V, summed over the sites of a choice."""
    found = 0.0
    for plan in choice.plans[count]:
        assert plan.error is not None and plan.energy is not None, "a budget is planned with statistics"
        found += plan.error.key / plan.energy.key + plan.error.value / plan.energy.value
    return found


def interpolated_loss(count: int, predicted: Mapping[int, float], measured: Mapping[int, float]) -> float:
    """Return the measured loss increase where there is one, elsewhere a power of the predicted error through the nearest measured points.

    `predicted` has every count, the full one with error 0, where nothing is lost.
    """
    if predicted[count] <= 0 or count == max(predicted):
        return 0.0
    if count in measured:
        return measured[count]
    points = sorted((predicted[n], measured[n]) for n in measured if predicted[n] > 0 and measured[n] > 0)
    if not points:
        return 0.0
    here = predicted[count]
    above = next((place for place, (error, _) in enumerate(points) if error >= here), len(points) - 1)
    above = max(above, min(1, len(points) - 1))
    (x0, y0), (x1, y1) = points[max(0, above - 1)], points[above]
    power = math.log(y1 / y0) / math.log(x1 / x0) if x1 > x0 and y1 > y0 else 1.0
    return y1 * (here / x1) ** power
