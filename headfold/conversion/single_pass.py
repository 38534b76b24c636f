"""Calibrate, plan and refit one block before the next one runs: the original is run over the calibration data once, one that is larger
than memory is read once, and the sums of one site are in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from .. import planning
from ..calibration import Observer, Sample
from ..checkpoint.stats_file import StatsFile, write_stats
from ..core.plan import Plan, SitePlan
from ..core.stats import SiteStats
from ..families.spec import Site
from ..parallel import on_main, on_main_only
from .fold_job import FoldJob
from .fold_request import FoldRequest
from .source import Source
from .teacher import Teacher
from .writing import choose_fold_layout

_SAMPLE = "sample.safetensors"


def suits(source: Source, request: FoldRequest, given: StatsFile | None) -> bool:
    """Return whether a fold can be made so: a decoder on packed text, whose sites are planned one by one, from statistics not yet there."""
    measures = (
        given is None and bool(request.statistics) and bool(request.settings["refit"]) and request.shrinks(source)
    )
    on_text = request.calibration is not None and request.calibration.kind == "text"
    by_block = all(site.stock_gqa and site.query_order != "stack" and not site.optional for site in source.every_site)
    # Groups of several sizes decide which layouts there are, which must be known before the work begins.
    counted = request.plan is not None or not planning.parse_group(request.group).unequal
    return measures and on_text and by_block and counted


def calibrate_plan_and_refit(job: FoldJob, teacher: Teacher, request: FoldRequest) -> tuple[StatsFile | None, Plan]:
    """Return the statistics, which lie on rank 0, and the plan; the refitted heads are kept in the job.

    Raises:
        UserError: the requested layout cannot hold the fold, activations are not finite, or the place is full.
    """
    source = teacher.source
    on_main(lambda: choose_fold_layout(source, request.plan or _counted(source, request), job.settings["layout"]))
    folder, sample_file = job.work / "statistics", job.work / "statistics" / _SAMPLE
    known = on_main(lambda: frozenset(path.stem for path in folder.glob("*.safetensors")))
    if sample_file.stem in known:
        teacher.use_sample(on_main_only(lambda: StatsFile(sample_file)))
    with job.timed("calibrate"):
        sample, metadata = teacher.sample, teacher.statistics_metadata()
        observer = Observer(teacher.model, request.statistics)
    on_main(lambda: None if sample_file.exists() else write_stats(sample_file, {}, metadata, sample))
    calibration = on_main(lambda: StatsFile(sample_file).metadata)
    current: dict[str, SiteStats] = {}
    plans: dict[str, SitePlan] = {}

    @contextmanager
    def watch(site: Site) -> Iterator[Callable[[Sample], None]]:
        with job.timed("calibrate"), observer.watching([] if site.name in known else [site]):
            yield partial(setattr, observer, "batch")

    def measured(site: Site) -> SiteStats:
        path = folder / f"{site.name}.safetensors"
        if site.name in known:
            return on_main(lambda: StatsFile(path)[site.name])
        with job.timed("calibrate"):
            seen = observer.take()
            on_main(lambda: write_stats(path, seen, metadata))
        return seen[site.name]

    def planned(site: Site, stats: SiteStats) -> Plan:
        with job.timed("plan"):
            return planning.make_plan(
                [site], source.checkpoint.read, request.kv_heads, source=source.checkpoint.fingerprint(), group=request.group,
                merge=request.merge, stats={site.name: stats}, calibration=calibration, seed=job.settings["seed"],
                head_dim_multiple=request.head_dim_multiple,
            )  # fmt: skip

    def plan_of(site: Site) -> Plan:
        current.clear()
        current[site.name] = measured(site)
        made = request.plan or on_main(lambda: planned(site, current[site.name]))
        plans[site.name] = made.sites[site.name]
        return made

    job.refit(teacher, plan_of, current, watch)

    def assembled() -> tuple[StatsFile, Plan]:
        statistics = StatsFile(sample_file, sorted(set(folder.glob("*.safetensors")) - {sample_file}))
        if request.plan is not None:
            return statistics, request.plan
        for site in source.sites:
            if site.name not in plans:  # refitted by an earlier run
                plans[site.name] = planned(site, statistics[site.name]).sites[site.name]
        sites = {site.name: plans[site.name] for site in source.sites}
        fingerprint = source.checkpoint.fingerprint()
        return statistics, Plan(sites, request.group, fingerprint, job.settings["seed"], calibration)

    found = on_main_only(assembled)
    return on_main_only(lambda: found[0]), on_main(lambda: found[1])


def _counted(source: Source, request: FoldRequest) -> Plan:
    """Return a plan with the counts of K/V heads that are asked for, which decide the layout."""
    return planning.make_plan(
        source.sites, source.checkpoint.read, request.kv_heads, source="", group="contiguous", merge=request.merge,
        head_dim_multiple=request.head_dim_multiple,
    )  # fmt: skip
