"""The facts on a fold's card: how it was made, its serving costs, its predicted error."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adequacy.reach import Reach, reach_of
from ..checkpoint.config import read_config
from ..checkpoint.refusals import model_class
from ..core.plan import Plan
from ..evaluate.verify import Verification
from ..exports.misread import misread_by
from ..families.context import context_length
from ..families.spec import APPROXIMATE, Site
from ..families.wrapped import is_wrapper
from ..recipes.recipe import NAME as RECIPE
from ..recipes.recipe import recipe_text
from ..refine.scope import Healing
from ..reports import tables
from ..reports.card import CardFacts
from ..stats_file import StatsFile
from .serving_cost import ServingCost
from .source import Source

_ROTATED_BY_LLAMA_CPP = 64
"""A multiple of this head_dim is what it rotates by a Hadamard matrix, in which a mean that is divided among all dims meets again."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """The steps by which heads were fitted after their merge, and the data they were fitted on."""

    refit_by: str = ""
    """What a refit trained together at its end (`FoldRequest.refit_by`); empty without a refit."""
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
    statistics: StatsFile | None,
    reach: Reach,
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
        adapter=source.plain.adapter,
        origin=source.plain.origin,
        family=source.config["model_type"],
        num_heads=tables.count_range(*_range(site.num_heads for site in source.sites)),
        num_kv_heads_before=tables.count_range(*_range(site.num_kv_heads for site in source.sites)),
        num_kv_heads_after=max(counts),
        num_kv_heads_least=min(counts),
        serving_costs=costs,
        method=settings["merge"],
        group=settings["group"],
        refit_by=fitting.refit_by,
        healed=fitting.healing.tokens,
        healed_by=fitting.healing.by,
        quantised_cache=plan.quantised_cache,
        calibration=statistics.metadata if statistics else {},
        reach=reach.line(),
        warnings=(*approximations(source), *reach.notes()),
        refit_text=fitting.data or {},
        command=fold_command(fold_options(_of_source(settings, source)), source.name, out.name),
        code=source.code,
        site_errors=errors or None,
        grouped_class=_grouped_class(config),
        wrapper_class=model_class(config, str(staging)) if is_wrapper(config) else "",
        misread=misread_by(config),
        seconds=times[0],
        estimated=times[1],
        verification=None if verification is None else (
            f"largest difference of logits to the head-repeated twin {verification.max_abs_difference:.2g} "
            f"(tolerance {verification.tolerance:.2g}, {verification.num_tokens} tokens, {verification.dtype})"
        ),
    )  # fmt: skip


def fold_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `headfold.fold` that make the fold again; `settings` are those of its job. Files have their usual names."""
    chosen: dict[str, Any]
    if settings["plan"]:
        chosen = {"plan": "plan.json"}
    else:
        count, multiple = settings["kv_heads"], settings["head_dim_multiple"]
        chosen = {"kv_heads": int(count) if count.isdecimal() else count}
        chosen |= {"head_dim_multiple": multiple} if multiple > 1 else {}
        chosen |= {"group": settings["group"], "merge": settings["merge"]}
    if adapter := settings.get("adapter"):
        chosen["adapter"] = Path(adapter).name if Path(adapter).is_absolute() else adapter
    chosen |= {"trust_remote_code": True} if settings.get("trust_remote_code") else {}
    chosen |= {"refit": bool(settings["refit"])} | ({"refit_by": settings["refit"]} if settings["refit"] else {})
    if settings["heal"]:
        chosen |= {"heal": True, "heal_by": settings["heal_by"], "heal_tokens": settings["heal"]}
    if settings["data"] and settings["data_from"] != "recorded":
        # Data that statistics or a plan record have a seed of their own, which goes with their name.
        chosen |= _data_options(settings["data"], is_recorded=settings["data_from"] != "call")
    chosen |= {name: True for name in ("encoder", "quantised_cache") if settings.get(name)}
    chosen |= {"stats": "stats.safetensors"} if settings["stats"] else {}
    chosen |= {name: settings[name] for name in ("layout", "dtype") if settings.get(name)}
    return {**chosen, "seed": settings["seed"]}


def fold_command(options: Mapping[str, Any], source: str, out: str) -> str:
    """Return the command line of a fold with `options`, those of `headfold.fold`. A directory is named by its last part."""
    words = ["headfold fold", Path(source).name if Path(source).exists() else source, out]
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option} {','.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def _of_source(settings: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return the settings of a job with those of its source."""
    return {**settings, "adapter": source.plain.adapter, "trust_remote_code": bool(source.code)}


def write_recipe(staging: Path, source: Source, settings: Mapping[str, Any]) -> None:
    """Write the recipe of a fold beside its weights."""
    options = fold_options(_of_source(settings, source))
    text = recipe_text(source.name, settings["source"], settings["version"], options, settings.get("code"))
    (staging / RECIPE).write_text(text, encoding="utf-8", errors="replace")


def _data_options(data: Mapping[str, Any], is_recorded: bool) -> dict[str, Any]:
    named = {} if is_recorded else {"calibration": data["source"]}
    amount = {"tokens": data["tokens"]} if data["kind"] == "text" else {"items": data["items"]}
    columns = {"columns": [*data["columns"]]} if data["columns"] and not is_recorded else {}
    return {**named, **amount, **columns, **({"context": data["context"]} if data["context"] else {})}


def _grouped_class(config: Mapping[str, Any]) -> str:
    """Return the auto class for the source's own task, where the output brings code along; else an empty string."""
    name = f".Grouped{next(iter(config.get('architectures') or ['']))}"
    found = [auto for auto, target in (config.get("auto_map") or {}).items() if target.endswith(name)]
    return (found or ["AutoModel"])[0] if "headfold" in config else ""


def calibration_reach(source: Source, plan: Plan, statistics: StatsFile | None, fitting: Fitting) -> Reach:
    """Return what the calibration data of a fold reach."""
    facts = statistics.metadata if statistics else fitting.data or {}
    context = context_length(source.config)
    return reach_of(source.sites, plan, statistics, facts, context, refitted=bool(fitting.refit_by))


def notes_on(
    source: Source, staging: Path, plan: Plan, sites_without_distances: Iterable[Site], reach: Reach
) -> list[str]:
    """Return what a user should know of the fold in `staging` beside its figures."""
    notes = approximations(source)
    if source.detected:
        model_type = source.config["model_type"]
        notes.append(f"{model_type} has no family literal: its architecture was detected, and every law holds")
    fixed = [site.name for site in source.sites if site.query_order == "fixed"]
    if fixed and plan.group != "contiguous":
        notes.append(
            f"{len(fixed)} sites have a fixed order of heads (ALiBi): neighbours are grouped there, not by {plan.group}"
        )
    turned = [plan.sites[site.name] for site in source.sites if site.name in plan.sites and not site.key_freedom.normed]
    if plan.quantised_cache and any(site.head_dim % _ROTATED_BY_LLAMA_CPP == 0 for site in turned):
        notes.append(
            "rotated for caches whose numbers have an offset (transformers, mlx-lm); llama.cpp rotates a quantised cache itself: fold for "
            "it without --quantised-cache"
        )
    config = read_config(staging)
    if "headfold" in config:
        notes.append("runs in headfold's runtime: headfold.load, or transformers with trust_remote_code=True")
    if source.code:
        notes.append(
            f"code of the checkpoint was run ({', '.join(source.code)}), and lies beside the fold, which needs it too"
        )
    if misread := misread_by(config):
        notes.append(misread)
    if blind := list(sites_without_distances):
        notes.append(
            f"calibration did not see how far back attention looks at {len(blind)} sites, so a distribution is assumed there"
        )
    return notes + reach.notes()


def approximations(source: Source) -> list[str]:
    """Return what a user should know where no fold of the model is exact, even of equal heads."""
    approximate = [site for site in source.sites if site.key_freedom.norm_spans_heads]
    return [f"{APPROXIMATE}: its gains are fitted to the original's"] if approximate else []


def _range(numbers: Iterable[int]) -> tuple[int, int]:
    """Return the least and the greatest."""
    found = list(numbers)
    return min(found), max(found)
