"""Settle a route on a folded checkpoint: measure its keys, fix which query heads read which K/V head, write and compare."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import calibration as calibrating
from .. import routing
from ..checkpoint.staging import commit, holds_other_job, job_key, refuse_overlap
from ..conversion.calibration_config import CalibrationConfig, CalibrationRequest
from ..conversion.routed import compare_routed, every_site, open_grouped, routed_config, write_routed
from ..conversion.teacher import Teacher
from ..core.plan import Plan
from ..core.progress import Progress, counter, no_progress
from ..hf_models import check_device, dtype_named
from ..outputs import staged
from ..parallel import on_all, on_main, spmd


@dataclass(frozen=True, slots=True)
class RouteResult:
    """A settled route. `difference` and `tolerance` are of the model's outputs, absolute."""

    out: Path
    route: str
    batch_dependent: bool
    """Whether the route depended on the batch, outside training, before it was settled; no settled one does."""
    sizes: Mapping[str, tuple[int, ...]]
    """Query heads of each K/V head, by site."""
    calibration: Mapping[str, str]
    difference: float
    tolerance: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {name: getattr(self, name) for name in self.__slots__} | {"out": str(self.out)}


@spmd
def route(
    folded: str | Path,
    out: str | Path,
    *,
    route: str = "kdgqa",
    calibration: str | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> RouteResult:
    """Write the grouped checkpoint `folded` again as `out`, with its query heads divided among the K/V heads as a route finds on data.

    The weights stay as they are, byte for byte; config.json and plan.json say which query heads read which K/V head. The result is
    opened again and compared with the routed model.

    Args:
        folded: A checkpoint directory with grouped K/V heads.
        out: The directory to write.
        route: Route with its options, as `headfold methods` lists them.
        calibration: A source of `headfold.corpus` that suits the model.
        tokens: Calibration tokens of a language model.
        items: Calibration items of other models.
        columns: Columns of a table.
        context: Tokens per window.
        seed: Seed of everything drawn at random.
        force: Replace what is at `out`.
        device: "cpu" or "cuda".
        dtype: What the model computes in, such as "float32".
        progress: Called with (stage, done, total).

    Raises:
        UserError: no grouped checkpoint, no such route or data, a route that leaves a K/V head without a query head, or an output that
            differs from the routed model.
    """
    out, place, compute_dtype = Path(out), check_device(device), dtype_named(dtype)
    refuse_overlap(Path(folded), out)
    method = routing.parse(route)
    source = on_all(lambda: open_grouped(Path(folded)))
    checkpoint = source.checkpoint
    data = CalibrationRequest(calibration, tokens, items, tuple(columns), context, seed)
    config = CalibrationConfig.resolve(source, data)
    settings = {
        "version": version("headfold"),
        "source": checkpoint.fingerprint(),
        "route": str(method),
        "data": asdict(config),
    }
    key, teacher = job_key(settings), Teacher(source, config, place, compute_dtype, progress or no_progress)
    if on_main(lambda: holds_other_job(out, key, force)):
        _ = teacher.sample  # a job without data is refused before what another one left is removed
    with staged(out, key, force) as staging:
        plan = _settled(teacher, method, seed)
        written = on_main(lambda: routed_config(checkpoint, plan))
        plan = replace(plan, sites=every_site(plan, written))

        def write() -> RouteResult:
            write_routed(checkpoint, staging, written, plan, teacher.progress)
            difference, tolerance = compare_routed(teacher, staging, written)
            commit(staging, out, force)
            sizes = {name: site.groups.sizes for name, site in plan.sites.items()}
            depends = routing.depends_on_batch(method)
            return RouteResult(out, str(method), depends, sizes, plan.calibration, difference, tolerance, teacher.notes)

        return on_main(write)


def _settled(teacher: Teacher, method: Any, seed: int) -> Plan:
    """Attach the route to the running model, measure it on the calibration data, and freeze it."""
    model, sample = teacher.model, teacher.sample
    on_all(lambda: routing.attach(model, str(method), seed=seed))
    advance = counter(teacher.progress, "route", calibrating.total_tokens(sample))

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for batch in calibrating.batches(sample):
            yield batch
            advance(calibrating.num_tokens(batch))

    routing.freeze(model, batches())
    return routing.frozen_plan(model, teacher.source.checkpoint.fingerprint(), teacher.data_facts())
