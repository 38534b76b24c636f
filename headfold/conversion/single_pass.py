"""Calibrate, plan and refit one block before the next one runs: the original runs over the calibration data once, and the statistics of
one site are in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from .. import planning
from ..calibration import Observer, Sample
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..families.spec import Site
from ..parallel import on_main, on_main_only
from ..stats_file import StatsFile
from .fold_job import FoldJob
from .fold_request import FoldRequest
from .source import Source
from .teacher import Teacher
from .writing import choose_fold_layout


def suits(source: Source, request: FoldRequest, given: StatsFile | None) -> bool:
    """Return whether a fold can be made so: a decoder on packed text whose class counts K/V heads, with a refit, and
    with a plan or sites that are planned one by one, from statistics that are not yet there.
    """
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
    source, sites = teacher.source, job.measured_sites
    on_main(lambda: choose_fold_layout(source, request.plan or _counted(source, request), job.settings["layout"]))
    if on_main(lambda: sites.has_sample):
        teacher.use_sample(on_main_only(sites.statistics))
    known = on_main(job.keep_whole_sites)
    if job.lacks_sites(source, job.refits()):
        work = _SinglePass.begun(job, teacher, request, known)
        job.refit(teacher, work.plan_of, work.current, work.watch)
    plan = request.plan or on_main(lambda: _assembled(job, source, request.group))
    return on_main_only(sites.statistics), request.finished(plan)


@dataclass(frozen=True, slots=True)
class _SinglePass:
    """What is measured and planned, site by site, while blocks are refitted."""

    job: FoldJob
    source: Source
    request: FoldRequest
    observer: Observer
    known: frozenset[str]
    """Names of the sites that an earlier run measured and planned."""
    facts: Mapping[str, str]
    """What the statistics are measured on."""
    current: dict[str, SiteStats] = field(default_factory=dict)
    """The statistics of the site that is being refitted, on rank 0."""

    @classmethod
    def begun(cls, job: FoldJob, teacher: Teacher, request: FoldRequest, known: frozenset[str]) -> "_SinglePass":
        """Open the original and keep its calibration data."""
        with job.timed("calibrate"):
            sample, facts = teacher.sample, teacher.statistics_metadata()
            observer = Observer(teacher.model, request.statistics)
            sites = job.measured_sites
            on_main(lambda: None if sites.has_sample else sites.put_sample(sample, facts))
        return cls(job, teacher.source, request, observer, known, dict(sorted(facts.items())))

    @contextmanager
    def watch(self, site: Site) -> Iterator[Callable[[Sample], None]]:
        """Measure a site while its block runs; `refine.fitting.Watch`."""
        self.current.clear()
        if site.name in self.known:
            yield lambda batch: None
            return
        with self.job.timed("calibrate"), self.observer.watching([site]):
            yield partial(setattr, self.observer, "batch")

    def plan_of(self, site: Site) -> Plan:
        """Return the plan of a site whose block has run."""
        sites, name = self.job.measured_sites, site.name
        self.current.clear()
        if name in self.known:
            self.current[name] = on_main_only(lambda: sites.stats(name))
            return on_main(lambda: sites.plan(name))
        with self.job.timed("calibrate"):
            seen = self.observer.take()
            self.current[name] = on_main_only(lambda: seen[name])
            on_main(lambda: sites.put(name, seen[name], self.facts))
        with self.job.timed("plan"):
            made = on_main(lambda: self._planned(site, seen[name]))
        on_main(lambda: sites.put_plan(name, made))
        return made

    def _planned(self, site: Site, stats: SiteStats) -> Plan:
        request = self.request
        if request.plan is not None:
            return replace(request.plan, sites={site.name: request.plan.sites[site.name]})
        return planning.make_plan(
            [site], self.source.checkpoint.read, request.kv_heads, source="", group=request.group, merge=request.merge,
            stats={site.name: stats}, calibration=self.facts, seed=self.job.settings["seed"],
            head_dim_multiple=request.head_dim_multiple,
        )  # fmt: skip


def _assembled(job: FoldJob, source: Source, group: str) -> Plan:
    """Return the plan of all sites from those of the single ones."""
    plans = [job.measured_sites.plan(site.name) for site in source.sites]
    sites = {name: planned for plan in plans for name, planned in plan.sites.items()}
    return Plan(sites, group, source.checkpoint.fingerprint(), job.settings["seed"], plans[0].calibration)


def _counted(source: Source, request: FoldRequest) -> Plan:
    """Return a plan with the counts of K/V heads that are asked for, which decide the layout."""
    return planning.make_plan(
        source.sites, source.checkpoint.read, request.kv_heads, source="", group="contiguous", merge=request.merge,
        head_dim_multiple=request.head_dim_multiple,
    )  # fmt: skip
