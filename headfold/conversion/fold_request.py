"""The resolved request of a fold: the plan or the methods to make it by, the calibration data, and the settings that identify the job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import planning
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.plan import Plan, SitePlan
from ..families.wrapped import is_wrapper
from ..head_dims import largest_multiple, possible_multiples
from ..hf_models import check_known_model
from ..refine.scope import Fits, Healing
from ..runtime.load import own_class
from ..stats_file import StatsFile
from ..towers import check_tower_runs
from ..trusted_code import trusted_code
from .calibration_config import CalibrationConfig, CalibrationRequest
from .plans import check_statistics
from .source import Source, with_sites_of
from .writing import choose_fold_layout


@dataclass(frozen=True, slots=True)
class FoldRequest:
    """A request with its defaults filled in. `plan` is None where it is still to be made by `group` and `merge`."""

    plan: Plan | None
    kv_heads: str | int
    """The count or share that the plan is made for; empty where there is a plan."""
    group: str
    merge: str
    head_dim_multiple: int
    encoder: bool
    statistics: frozenset[str]
    """Names of the statistics that the methods need."""
    calibration: CalibrationConfig | None
    """None where no step needs data and none is named."""
    healing: Healing
    refit_by: str
    """What ends the refit: training of the "model" or of each "block" alone, or "squares", neither; empty without a refit."""
    quantised_cache: bool
    """Whether K and V are rotated for a quantised cache at the end."""
    settings: Mapping[str, Any]
    """Whatever decides the output: two calls with equal settings are one job, and the second resumes the first."""

    def needs_data(self, source: Source, stats: StatsFile | None) -> bool:
        """Return whether a step takes calibration data, beside the statistics that are given."""
        fits = (self.settings["refit"] or self.settings["heal"]) and self.shrinks(source)
        return bool(fits or (self.statistics and stats is None))

    def finished(self, plan: Plan) -> Plan:
        """Return a plan of the methods, or the one that was given, with what is done at the end."""
        return replace(plan, quantised_cache=self.quantised_cache)

    def shrinks(self, source: Source) -> bool:
        """Return whether any site of the source gets fewer K/V heads."""
        if self.plan:
            counts = [*self.plan.num_kv_heads.values()]
        else:
            counts = planning.counts_of(source.sites, self.kv_heads, planning.parse_group(self.group))
        return sum(counts) // self.head_dim_multiple < sum(site.num_kv_heads for site in source.sites)


def resolve_fold(
    source: Source,
    *,
    kv_heads: str | int | None,
    plan: str | Path | Plan | None,
    head_dim_multiple: str | int,
    group: str,
    merge: str,
    fits: Fits,
    device: str,
    data: CalibrationRequest,
    stats: StatsFile | None,
    layout: str | None = None,
    quantised_cache: bool = False,
) -> FoldRequest:
    """Check the options of a fold against the source and fill in the defaults.

    Raises:
        UserError: a count, method, plan or layout that does not suit the source, or a config that does not say of what class it is;
            options that exclude each other.
    """
    if (kv_heads is None) == (plan is None):
        raise UserError("fold: expected either kv_heads or plan, got both or none; give one")
    fits.check()
    ready = plan if isinstance(plan, Plan | None) else Plan.load(Path(plan))
    multiple = 1
    check_known_model(
        source.checkpoint, own_class(source.checkpoint.config, source.checkpoint.path)
    )  # before anything is measured
    if ready is None:
        assert kv_heads is not None
        planning.counts_of(source.sites, kv_heads, planning.parse_group(group))
        needed = planning.statistics_needed(group, merge)
        multiples = possible_multiples(source.sites, head_dim_multiple, group, merge)
        multiple = largest_multiple(source.sites, multiples, kv_heads, group)
    else:
        source = with_sites_of(source, ready)
        ready.check_source(source.checkpoint.fingerprint(), source.sites, "plan" if plan is ready else str(plan))
        group, merge = ready.group, next(iter(ready.sites.values())).merge
        needed = planning.statistics_needed("contiguous", merge)
    quantised_cache = quantised_cache or (ready is not None and ready.quantised_cache)
    if quantised_cache:
        needed |= planning.PREDICTION_STATISTICS
        if stats is not None:
            check_statistics(source, stats, planning.PREDICTION_STATISTICS)
    recorded = stats.metadata if stats is not None else ready.calibration if ready else {}
    earlier, calibration = CalibrationRequest.recorded(recorded), None
    if needed or fits.refit or fits.heal or data.source is not None or earlier:
        calibration = CalibrationConfig.resolve(source, data, recorded)
    if is_wrapper(source.config):
        check_tower_runs(source.name, source.sites, None if calibration is None else calibration.kind)
    if layout is not None and (expected := ready or _equal_groups(source, kv_heads, group, multiple)):
        choose_fold_layout(source, expected, layout)
    together, healing = "", Healing()
    if calibration is not None:
        together, healing = fits.resolved(
            source.checkpoint, source.sites, calibration.kind, calibration.tokens, device, more=not calibration.is_written
        )  # fmt: skip
    code = trusted_code(source.config["model_type"])
    settings = {
        "version": version("headfold"), "source": source.checkpoint.fingerprint(), "kv_heads": str(kv_heads),
        "head_dim_multiple": multiple, "plan": ready and ready.to_json(), "group": group, "merge": merge,
        "refit": together, "heal": healing.tokens, "heal_by": healing.by,
        "data": calibration and asdict(calibration), "data_from": data_from(data, earlier), "encoder": source.encoder,
        "stats": stats and stats.metadata, **({"code": code.digest} if code else {}),
        **({"quantised_cache": True} if quantised_cache else {}),
    }  # fmt: skip
    count = "" if kv_heads is None else kv_heads
    return FoldRequest(
        ready,
        count,
        group,
        merge,
        multiple,
        source.encoder,
        needed,
        calibration,
        healing,
        together,
        quantised_cache,
        settings,
    )


def data_from(data: CalibrationRequest, earlier: CalibrationRequest | None) -> str:
    """Return where calibration data come from: the call names them, or what statistics or a plan record, of which it may name an amount."""
    if earlier is None or data.source is not None:
        return "call"
    return "recorded, other amount" if data.names_data else "recorded"


def _equal_groups(source: Source, kv_heads: str | int | None, group: str, head_dim_multiple: int) -> Plan | None:
    """Return a plan whose groups have the sizes of those that will be found; None where the sizes are to be found too."""
    grouping = planning.parse_group(group)
    if kv_heads is None or grouping.unequal or head_dim_multiple > 1:
        return None
    counts = zip(source.sites, planning.counts_of(source.sites, kv_heads, grouping), strict=True)
    sites = {
        site.name: SitePlan(Groups.contiguous(site.num_kv_heads, count), "mean", site.head_dim)
        for site, count in counts
    }
    return Plan(sites, "contiguous", "", 0)
