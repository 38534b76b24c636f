"""One fold in its staging directory: what an earlier run of the same job left there, and how long each stage was to take."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.staging import holds_other_job, job_key
from ..checkpoint.upload import upload
from ..core.fitted import FittedHeads
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..families.spec import Site
from ..outputs import StagedJob, staged
from ..parallel import on_main, on_main_only
from ..refine.fitting import Watch
from ..refine.scope import Healing
from ..reports.tables import estimate
from ..stats_file import StatsFile
from .estimate import estimated_seconds
from .fitted_sites import FittedSites
from .fold_request import FoldRequest
from .measured_sites import MeasuredSites
from .plans import plan_uniform
from .provenance import Fitting
from .source import Source
from .teacher import Teacher

SAID_FROM = 20.0
"""Seconds of a whole job from which its estimate is said, not only recorded."""
_STATISTICS = "stats.safetensors"


@dataclass(slots=True)
class FoldJob(StagedJob):
    """The staging directory of one fold, with what is computed on the way to it. All of it lies on rank 0."""

    settings: Mapping[str, Any]
    estimated: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, as they were estimated before."""

    @classmethod
    @contextmanager
    def opened(
        cls, out: Path, settings: Mapping[str, Any], force: bool, teacher: Teacher, request: FoldRequest, given: StatsFile | None,
        repository: str | None = None,
    ) -> Iterator["FoldJob"]:  # fmt: skip
        """Own `OUT.partial`, empty or as an earlier run of the same settings left it; it is removed if an error leaves it empty.

        Raises:
            AlreadyFinished: an earlier run was killed when its output was whole, which is in `repository` now, if one is named.
            UserError: `out` has contents and `force` is not given, another run writes there, the place cannot be written to, or there are
                no calibration data.
        """
        key = job_key(settings)
        needs_data = on_main(lambda: request.needs_data(teacher.source, given))
        if needs_data and on_main(lambda: holds_other_job(out, key, force)):
            _ = teacher.sample  # a job without data is refused before what another one left is removed
        publish = None if repository is None else partial(upload, out, repository)
        with staged(out, key, force, publish) as staging:
            job = cls(staging, settings, publish=publish)
            on_main(lambda: job.work.mkdir(exist_ok=True))
            if needs_data and teacher.takes_texts():
                job._draw_texts(teacher)
            yield job

    @property
    def measured_sites(self) -> MeasuredSites:
        """The statistics and plans of single sites; those of rank 0."""
        return MeasuredSites(self.work)

    def keep_whole_sites(self) -> frozenset[str]:
        """Return the names of the sites that are measured and planned, and forget refits of others. On rank 0 alone."""
        whole = self.measured_sites.names()
        for file in (self.work / "refit").glob("*.safetensors"):
            if file.stem not in whole:
                file.unlink()
        return whole

    def refits(self) -> FittedSites:
        """Return the refitted heads so far, which lie on rank 0."""
        return on_main_only(lambda: FittedSites(self.work / "refit"))

    def _draw_texts(self, teacher: Teacher) -> None:
        """Draw texts that come one by one, so that their lengths are known, unless an earlier run has; all ranks together."""
        with self.timed("calibrate"):
            path = self.work / _STATISTICS
            teacher.use_sample(on_main_only(lambda: StatsFile(path) if path.exists() else None))
            _ = teacher.sample

    def estimate(
        self, teacher: Teacher, request: FoldRequest, given: StatsFile | None, verifies: bool, *, single_pass: bool
    ) -> str:
        """Estimate how long what is left to do will take, and return a line on it; an empty one where it is not long."""
        fitted = {
            stage: {file.stem for file in (self.work / stage).glob("*.safetensors")} for stage in ("refit", "heal")
        }
        measured = given is not None or (self.work / _STATISTICS).exists()
        if single_pass:
            measured = {site.name for site in teacher.source.sites} <= self.measured_sites.names() & fitted["refit"]
        with suppress(Exception):  # a fold does not fail because of it
            self.estimated = estimated_seconds(
                teacher,
                request,
                measured=measured,
                fitted=fitted,
                verifies=verifies,
                single_pass=single_pass,
                drawn=self.measured_sites.has_sample,
            )
        return f"fold: {estimate(self.estimated)}" if sum(self.estimated.values()) >= SAID_FROM else ""

    def calibrated(self, teacher: Teacher, given: StatsFile | None, needed: frozenset[str]) -> StatsFile | None:
        """Return the statistics that were given, else those of an earlier run, else measure the `needed` ones; None where none are."""
        path = self.work / _STATISTICS
        if on_main(lambda: given is not None) or not needed:
            return given
        with self.timed("calibrate"):
            if on_main(lambda: not path.exists()):
                teacher.write_statistics(path, needed)
            stats = on_main_only(lambda: StatsFile(path))
            teacher.use_sample(stats)
            return stats

    def planned(self, teacher: Teacher, request: FoldRequest, stats: StatsFile | None) -> Plan:
        """Return the plan that was given, else make one."""
        with self.timed("plan"):
            return request.finished(request.plan or on_main(lambda: plan_uniform(
                teacher.source, request.kv_heads, request.group, request.merge, stats, self.settings["seed"], teacher.progress,
                request.head_dim_multiple,
            )))  # fmt: skip

    def refit(
        self,
        teacher: Teacher,
        plan_of: Callable[[Site], Plan],
        stats: Mapping[str, SiteStats] | None,
        watch: Watch | None = None,
    ) -> None:
        """Refit the sites that no earlier run refitted; `plan_of`, `stats` and `watch` as in `Teacher.refit`."""
        with self.timed("refit"):
            fitted = self.refits()
            if self.lacks_sites(teacher.source, fitted):
                teacher.refit(plan_of, stats, fitted, self.settings["refit"], watch)

    def refitted(
        self, teacher: Teacher, plan: Plan, stats: StatsFile | None
    ) -> tuple[Mapping[str, FittedHeads], Fitting]:
        """Return the refitted heads of every site and what they were fitted on."""
        self.refit(teacher, lambda site: plan, stats)
        fitted, by = self.refits(), self.settings["refit"]
        if by == "model":
            with self.timed("refit"):
                alone, fitted = fitted, on_main_only(lambda: FittedSites(self.work / "together"))
                if self.lacks_sites(teacher.source, fitted):
                    teacher.refit_together(plan, stats, alone, fitted, self.settings["seed"])
        return fitted, Fitting(by, data=on_main(lambda: fitted.facts))

    def healed(
        self,
        teacher: Teacher,
        plan: Plan,
        stats: StatsFile | None,
        refits: Mapping[str, FittedHeads] | None,
        fitting: Fitting,
        healing: Healing,
    ) -> tuple[Mapping[str, FittedHeads], Fitting]:
        """Return the trained heads, from where merge and refit end."""
        with self.timed("heal"):
            trained = on_main_only(lambda: FittedSites(self.work / "heal"))
            if self.lacks_sites(teacher.source, trained):
                teacher.heal(plan, stats, refits, trained, healing, self.settings["seed"])
            return trained, Fitting(fitting.refit_by, healing, on_main(lambda: trained.facts))

    @staticmethod
    def lacks_sites(source: Source, fitted: FittedSites) -> bool:
        """Return whether a site is left to fit."""
        return on_main(lambda: any(site.name not in fitted for site in source.sites))
