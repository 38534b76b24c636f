"""Plans with one count of K/V heads, or one share, for all sites; and what methods need for them."""

from collections.abc import Iterator

from .. import planning
from ..core.errors import UserError
from ..core.plan import Plan
from ..core.progress import Progress
from ..families.spec import Site
from ..merge import parse_merge
from ..stats_file import StatsFile
from .source import Source

OPTIONAL = frozenset({"attended"})
"""Statistics that are assumed where they were not measured."""


def plan_uniform(
    source: Source,
    kv_heads: str | int,
    group: str,
    merge: str,
    stats: StatsFile | None,
    seed: int,
    progress: Progress,
    head_dim_multiple: int = 1,
    workers: int = 1,
) -> Plan:
    """Group the K/V heads of every site into `kv_heads`, a count or a share.

    Raises:
        UserError: a method needs statistics and there are none; see `planning.make_plan`.
    """
    needed = planning.statistics_needed(group, merge)
    if stats is None and needed:
        raise UserError(
            f"--group {group} --merge {merge}: needs calibration statistics: run headfold calibrate and pass --stats, "
            "or choose --group contiguous --merge mean"
        )
    if stats is not None:
        check_statistics(source, stats, needed - OPTIONAL)
    names = [site.name for site in source.sites]
    return planning.make_plan(
        source.sites,
        source.checkpoint.read,
        kv_heads,
        source=source.checkpoint.fingerprint(),
        group=group,
        merge=merge,
        stats=stats,
        calibration=None if stats is None else stats.metadata,
        seed=seed,
        head_dim_multiple=head_dim_multiple,
        workers=workers,
        progress=lambda name: progress("plan", names.index(name), len(names)),
    )


def check_statistics(source: Source, stats: StatsFile, needed: frozenset[str]) -> None:
    """Check that a file of statistics holds the `needed` ones of every site.

    Raises:
        UserError: names the first that is missing.
    """
    for site in source.sites:
        if missing := sorted(name for name in needed if not stats.holds(site.name, name)):
            raise UserError(
                f"{stats.path}: expected the statistic {missing[0]} for {site.name}, which the methods need, found none; "
                "run headfold calibrate again"
            )


def sites_with_assumed_distances(source: Source, plan: Plan, stats: StatsFile | None) -> Iterator[Site]:
    """Yield the sites whose merge fits read-outs over attention distances that the statistics do not hold."""
    for site in source.sites:
        fits = parse_merge(plan.sites[site.name].merge).record.fits_distances
        rotates = site.key_freedom.frequencies
        if fits and rotates and stats is not None and not stats.holds(site.name, "attended"):
            yield site
