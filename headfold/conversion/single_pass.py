"""Calibrate, plan and refit one block before the next one runs: the original is run over the calibration data once, one that is larger
than memory is read once, and the sums of one site are in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

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
    work = _SinglePass.opened(job, teacher, request)
    job.refit(teacher, work.plan_of, work.current, work.watch)
    return on_main_only(work.statistics), on_main(work.plan)


@dataclass(frozen=True, slots=True)
class _SinglePass:
    """What is measured and planned, site by site, while blocks are refitted. Statistics lie in files of one site each, on rank 0."""

    job: FoldJob
    source: Source
    request: FoldRequest
    observer: Observer
    known: frozenset[str]
    """Names of the sites that an earlier run measured."""
    facts: Mapping[str, str]
    """What the statistics were measured on."""
    current: dict[str, SiteStats] = field(default_factory=dict)
    """The statistics of the site that is being refitted."""
    plans: dict[str, SitePlan] = field(default_factory=dict)

    @classmethod
    def opened(cls, job: FoldJob, teacher: Teacher, request: FoldRequest) -> "_SinglePass":
        """Open what an earlier run left, or draw the calibration data and keep it."""
        folder = job.work / "statistics"
        sample_file = folder / _SAMPLE
        known = on_main(lambda: frozenset(path.stem for path in folder.glob("*.safetensors")))
        if sample_file.stem in known:
            teacher.use_sample(on_main_only(lambda: StatsFile(sample_file)))
        with job.timed("calibrate"):
            sample, facts = teacher.sample, teacher.statistics_metadata()
            observer = Observer(teacher.model, request.statistics)
        if sample_file.stem not in known:
            on_main(lambda: write_stats(sample_file, {}, facts, sample))
        return cls(job, teacher.source, request, observer, known, dict(sorted(facts.items())))

    def _file(self, name: str) -> Path:
        return self.job.work / "statistics" / name

    @contextmanager
    def watch(self, site: Site) -> Iterator[Callable[[Sample], None]]:
        """Measure a site while its block runs; `refine.fitting.Watch`."""
        with self.job.timed("calibrate"), self.observer.watching([] if site.name in self.known else [site]):
            yield partial(setattr, self.observer, "batch")

    def plan_of(self, site: Site) -> Plan:
        """Return the plan of a site whose block has run."""
        self.current.clear()
        stats = self.current[site.name] = self._measured(site)
        made = self.request.plan or on_main(lambda: self._planned(site, stats))
        self.plans[site.name] = made.sites[site.name]
        return made

    def _measured(self, site: Site) -> SiteStats:
        path = self._file(f"{site.name}.safetensors")
        if site.name in self.known:
            return on_main(lambda: StatsFile(path)[site.name])
        with self.job.timed("calibrate"):
            seen = self.observer.take()
            on_main(lambda: write_stats(path, seen, self.facts))
        return seen[site.name]

    def _planned(self, site: Site, stats: SiteStats) -> Plan:
        request = self.request
        with self.job.timed("plan"):
            return planning.make_plan(
                [site], self.source.checkpoint.read, request.kv_heads, source=self.source.checkpoint.fingerprint(), group=request.group,
                merge=request.merge, stats={site.name: stats}, calibration=self.facts, seed=self.job.settings["seed"],
                head_dim_multiple=request.head_dim_multiple,
            )  # fmt: skip

    def statistics(self) -> StatsFile:
        """Return the statistics of all sites; only rank 0 has them."""
        sample_file = self._file(_SAMPLE)
        return StatsFile(sample_file, sorted(set(self._file("").glob("*.safetensors")) - {sample_file}))

    def plan(self) -> Plan:
        """Return the plan of all sites; those that an earlier run refitted are planned again, on rank 0."""
        if self.request.plan is not None:
            return self.request.plan
        for site in self.source.sites:
            if site.name not in self.plans:
                self.plans[site.name] = self._planned(site, self.statistics()[site.name]).sites[site.name]
        sites = {site.name: self.plans[site.name] for site in self.source.sites}
        fingerprint = self.source.checkpoint.fingerprint()
        return Plan(sites, self.request.group, fingerprint, self.job.settings["seed"], self.facts)


def _counted(source: Source, request: FoldRequest) -> Plan:
    """Return a plan with the counts of K/V heads that are asked for, which decide the layout."""
    return planning.make_plan(
        source.sites, source.checkpoint.read, request.kv_heads, source="", group="contiguous", merge=request.merge,
        head_dim_multiple=request.head_dim_multiple,
    )  # fmt: skip
