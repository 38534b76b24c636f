"""The facts on a fold's card: how it was made, its serving costs, its predicted error."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.config import read_config
from ..checkpoint.stats_file import StatsFile
from ..core.plan import Plan
from ..core.stats import NARROW
from ..evaluate.verify import Verification
from ..exports.misread import misread_by
from ..families.spec import Site
from ..report import tables
from ..report.card import CardFacts
from .healing import Healing
from .serving_cost import ServingCost
from .source import Source


@dataclass(frozen=True, slots=True)
class Fitting:
    """The steps by which heads were fitted after their merge, and the data they were fitted on."""

    refitted: bool = False
    healing: Healing = Healing()
    data: Mapping[str, str] | None = None
    """The facts of the data that heads were fitted on."""


def card_facts(
    source: Source,
    out: Path,
    staging: Path,
    plan: Plan,
    settings: Mapping[str, Any],
    costs: tuple[ServingCost, ServingCost],
    fitting: Fitting,
    calibration: Mapping[str, str],
    verification: Verification | None,
    times: tuple[Mapping[str, float], Mapping[str, float]],
) -> CardFacts:
    """Return the facts of the card of a fold that lies whole in `staging`. `times` are the seconds by stage, and as estimated."""
    planned = {name: site for name, site in plan.sites.items() if site.error and site.energy}
    errors = {
        name: (site.error.key / site.energy.key, site.error.value / site.energy.value)
        for name, site in planned.items()
        if site.error and site.energy
    }
    counts, config = plan.num_kv_heads.values(), read_config(staging)
    return CardFacts(
        base_model=source.name,
        origin=source.plain.origin,
        family=source.checkpoint.config["model_type"],
        num_heads=tables.count_range(*_range(site.num_heads for site in source.sites)),
        num_kv_heads_before=tables.count_range(*_range(site.num_kv_heads for site in source.sites)),
        num_kv_heads_after=max(counts),
        num_kv_heads_least=min(counts),
        serving_costs=costs,
        method=settings["merge"],
        group=settings["group"],
        refit=fitting.refitted,
        healed=fitting.healing.tokens,
        healed_by=fitting.healing.by,
        calibration=calibration,
        refit_text=fitting.data or {},
        command=fold_command({**settings, "adapter": source.plain.adapter}, source.name, out.name),
        site_errors=errors or None,
        grouped_class=_grouped_class(config),
        misread=misread_by(config),
        seconds=times[0],
        estimated=times[1],
        verification=None if verification is None else (
            f"largest difference of logits to the head-repeated twin {verification.max_abs_difference:.2g} "
            f"(tolerance {verification.tolerance:.2g}, {verification.num_tokens} tokens, {verification.dtype})"
        ),
    )  # fmt: skip


def fold_command(settings: Mapping[str, Any], source: str, out: str) -> str:
    """Return the command line that makes the fold again; `settings` are those of its job. A directory is named by its last part."""
    words = ["headfold fold", Path(source).name if Path(source).exists() else source, out]
    words += [f"--adapter {Path(settings['adapter']).name}"] if settings.get("adapter") else []
    if settings["plan"]:
        words += ["--plan plan.json"]
    else:
        multiple = settings["head_dim_multiple"]
        words += [f"--kv-heads {settings['kv_heads']}"]
        words += [f"--head-dim-multiple {multiple}"] if multiple > 1 else []
        words += [f"--group {settings['group']}", f"--merge {settings['merge']}"]
    words += ["--refit" if settings["refit"] else "--no-refit"]
    words += [f"--heal --heal-by {settings['heal_by']} --heal-tokens {settings['heal']}"] if settings["heal"] else []
    words += _data_options(settings["data"]) if settings["data"] else []
    words += ["--encoder"] if settings["encoder"] else []
    words += ["--stats stats.safetensors"] if settings["stats"] else []
    words += [f"--layout {settings['layout']}"] if settings["layout"] else []
    words += [f"--dtype {settings['dtype']}"] if settings.get("dtype") else []
    words += [f"--seed {settings['seed']}"]
    return " ".join(words)


def _data_options(data: Mapping[str, Any]) -> list[str]:
    amount = f"--tokens {data['tokens']}" if data["kind"] == "text" else f"--items {data['items']}"
    words = [f"--calibration {data['source']}", amount]
    words += [f"--columns {','.join(data['columns'])}"] if data["columns"] else []
    return words + ([f"--context {data['context']}"] if data["context"] else [])


def _grouped_class(config: Mapping[str, Any]) -> str:
    """Return the auto class for the source's own task, where the output brings code along; else an empty string."""
    name = f".Grouped{next(iter(config.get('architectures') or ['']))}"
    found = [auto for auto, target in (config.get("auto_map") or {}).items() if target.endswith(name)]
    return (found or ["AutoModel"])[0] if "headfold" in config else ""


def _narrow_calibration(source: Source, statistics: StatsFile) -> str | None:
    """Return a note if some site was measured at few positions for its size: what such a fold has not seen, it does badly."""
    ratios = {site.name: statistics.positions_per_dim(site.name) for site in source.sites if site.name in statistics}
    if not ratios or min(ratios.values()) >= NARROW:
        return None
    least = min(ratios, key=lambda name: ratios[name])
    return (
        f"calibration is narrow: {ratios[least]:.1f} positions per input dim at {least}, where {NARROW} are the least that carry "
        "over to other data; use more data, from every domain the fold will see"
    )


def notes_on(
    source: Source, staging: Path, group: str, sites_without_distances: Iterable[Site], statistics: StatsFile | None
) -> list[str]:
    """Return what a user should know of the fold in `staging` beside its figures."""
    notes = []
    if source.detected:
        model_type = source.checkpoint.config["model_type"]
        notes.append(f"{model_type} has no family literal: its architecture was detected, and every law holds")
    fixed = [site.name for site in source.sites if site.query_order == "fixed"]
    if fixed and group != "contiguous":
        notes.append(
            f"{len(fixed)} sites have a fixed order of heads (ALiBi): neighbours are grouped there, not by {group}"
        )
    config = read_config(staging)
    if "headfold" in config:
        notes.append("runs in headfold's runtime: headfold.load, or transformers with trust_remote_code=True")
    if misread := misread_by(config):
        notes.append(misread)
    if blind := list(sites_without_distances):
        notes.append(
            f"calibration did not see how far back attention looks at {len(blind)} sites, so a distribution is assumed there"
        )
    narrow = _narrow_calibration(source, statistics) if statistics else None
    return notes + ([narrow] if narrow else [])


def _range(numbers: Iterable[int]) -> tuple[int, int]:
    """Return the least and the greatest."""
    found = list(numbers)
    return min(found), max(found)
