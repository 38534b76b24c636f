"""Decide who shares: a plan from headers, weights and statistics."""

from pathlib import Path

from .. import merge as merges
from .. import planning
from ..checkpoint.staging import write_json
from ..checkpoint.stats_file import StatsFile
from ..core import plugins
from ..core.errors import UserError
from ..core.plan import Plan
from .source import Opened, Progress, open_source, open_stats, refuse_existing, silent


def plan(
    model: str | Path,
    out: str | Path | None = None,
    *,
    kv_heads: str | int,
    group: str = "swap",
    merge: str = "absorb",
    stats: str | Path | None = None,
    encoder: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Decide which K/V heads share one and predict the loss; writes the plan to `out` if one is given.

    An encoder-decoder's encoder stays as it is unless `encoder` is true.

    Raises:
        UserError: see `open_source`, `parse_kv_heads`; a method that needs statistics without `stats`.
    """
    if out is not None:
        refuse_existing(Path(out), force)
    source = open_source(model, encoder)
    made = plan_source(source, kv_heads, group, merge, open_stats(stats, source), seed, progress or silent)
    if out is not None:
        write_json(Path(out), made.to_json())
    return made


def plan_source(
    source: Opened,
    kv_heads: str | int,
    group: str,
    merge: str,
    stats: StatsFile | None,
    seed: int,
    progress: Progress,
) -> Plan:
    if stats is None and needs_statistics(group, merge):
        raise UserError(
            f"--group {group} --merge {merge} need calibration statistics: run headfold calibrate and pass --stats, "
            "or choose --group contiguous --merge mean"
        )
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
        progress=lambda name: progress("plan", names.index(name), len(names)),
    )


def needs_statistics(group: str, merge: str) -> bool:
    """Whether a method asks for statistics. A grouping cost mostly does: without data it would group by weights alone, unasked."""
    method = plugins.parse(merges, merge, "merge")
    return bool(planning.parse_group(group).needs) or bool(plugins.needs(method))
