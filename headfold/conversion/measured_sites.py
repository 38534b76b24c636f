"""Statistics and plans of single sites on disk, from which a killed fold goes on. Only rank 0 has them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..checkpoint.staging import write_json
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..stats_file import StatsFile, write_stats

_SAMPLE = "sample.safetensors"
_STATISTICS, _PLANS = "statistics", "plans"


class MeasuredSites:
    """A directory with the calibration data and, of every measured site, a file of statistics and its plan.

    A site's plan is written after its statistics, so a site that has a plan and statistics is whole.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def has_sample(self) -> bool:
        """Whether the calibration data, or a note that they are too large to keep, are there."""
        return self._file(_STATISTICS, _SAMPLE).exists()

    def put_sample(self, sample: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Keep the calibration data and what is known of them."""
        write_stats(self._file(_STATISTICS, _SAMPLE), {}, facts, sample)

    def put(self, name: str, stats: SiteStats, facts: Mapping[str, str]) -> None:
        """Keep the statistics of a site."""
        write_stats(self._file(_STATISTICS, f"{name}.safetensors"), {name: stats}, facts)

    def put_plan(self, name: str, plan: Plan) -> None:
        """Keep a plan that has this site alone."""
        write_json(self._file(_PLANS, f"{name}.json"), plan.to_json())

    def names(self) -> frozenset[str]:
        """Return the names of the sites that are whole."""
        return frozenset(
            path.stem
            for path in (self._directory / _PLANS).glob("*.json")
            if self._file(_STATISTICS, f"{path.stem}.safetensors").exists()
        )

    def plan(self, name: str) -> Plan:
        """Return the plan of a site."""
        return Plan.load(self._file(_PLANS, f"{name}.json"))

    def stats(self, name: str) -> SiteStats:
        """Return the statistics of a site."""
        return StatsFile(self._file(_STATISTICS, f"{name}.safetensors"))[name]

    def statistics(self) -> StatsFile:
        """Return the statistics of all measured sites, with the calibration data."""
        sample = self._file(_STATISTICS, _SAMPLE)
        return StatsFile(sample, sorted(set(sample.parent.glob("*.safetensors")) - {sample}))

    def _file(self, folder: str, name: str) -> Path:
        return self._directory / folder / name
