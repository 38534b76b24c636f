"""Write a grouped checkpoint again with its query heads divided among the K/V heads as a settled route says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.cards import read_card, write_card
from ..checkpoint.reader import Checkpoint
from ..checkpoint.refusals import model_class
from ..checkpoint.staging import copy_side_files, write_json, wrong_output
from ..checkpoint.writer import output_bytes, rewrite
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.plan import Plan, SitePlan
from ..core.progress import Progress, counter
from ..divergence import difference_and_tolerance
from ..evaluate.verify import compared_output
from ..exports.card import exported_card
from ..exports.pieces import Export
from ..families.folded import runtime_entry
from ..families.spec import Family
from ..families.wrapped import is_in_language_model
from ..hf_models import exceeds_memory, open_model, stored_dtype
from ..reports.card import routed_card
from ..runtime.load import own_class, read_checked_config
from ..runtime.remote import auto_map, remote_files
from ..sources.plain import Plain
from .source import Source, open_source
from .teacher import Teacher
from .verification import ITEMS

SAID = "Query heads are divided unevenly, as the grouped class beside the weights reads it (`modeling_headfold.py`)"


def open_grouped(folded: Path) -> Source:
    """Open a grouped checkpoint as calibration needs it; its sites are found in the running model.

    Raises:
        UserError: not a grouped checkpoint, one with a folded tower, or one that does not fit into memory.
    """
    config = read_checked_config(folded)
    listed = config["headfold"]["sites"] if "headfold" in config else []
    if listed and not any(is_in_language_model(config["model_type"], site["module"]) for site in listed):
        raise UserError(
            f"{folded}: expected a fold of a language model to route, got one whose tower is folded too, which lists the heads of that "
            "alone; fold without --encoder"
        )
    checkpoint = Checkpoint.open(folded)
    if exceeds_memory(checkpoint, torch.promote_types(stored_dtype(folded), torch.float32)):
        raise UserError(f"{folded}: expected a model that fits into memory, to run it routed; use a larger machine")
    return Source(str(folded), Plain(folded, folded), checkpoint, checkpoint.config, Family(()), [])


def routed_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return the config with the plan's groups at its sites, listed for headfold's runtime where a stock class did not list them."""
    config = checkpoint.config
    model_class(config, f"{checkpoint.path}/config.json")
    listed = config["headfold"]["sites"] if "headfold" in config else _listed(checkpoint)
    sites = [{name: value for name, value in site.items() if name != "kv_of_query"} for site in listed]
    old = [site.get("kv_of_query") for site in listed]
    for site, before in zip(sites, old, strict=True):
        planned = plan.sites.get(_path(site["module"], plan))
        kv_of_query = before if planned is None else list(planned.groups.group_of_head)
        if kv_of_query is not None and not Groups(tuple(kv_of_query)).is_contiguous:
            site["kv_of_query"] = kv_of_query
    made = {**config, "headfold": {**config.get("headfold", {}), "sites": sites}}
    return {**made, "auto_map": auto_map(made)}


def every_site(plan: Plan, config: Mapping[str, Any]) -> dict[str, SitePlan]:
    """Return the plans of all sites that the config lists, by module, with those whose route had no choice."""
    sites = {}
    for site in config["headfold"]["sites"]:
        equal = Groups.contiguous(site["heads"], site["kv_heads"]).group_of_head
        own = Groups(tuple(site.get("kv_of_query") or equal))
        kept = SitePlan(own, "route", site["head_dim"] * site.get("slots", 1))
        sites[site["module"]] = plan.sites.get(_path(site["module"], plan), kept)
    return sites


def write_routed(checkpoint: Checkpoint, staging: Path, config: dict[str, Any], plan: Plan, progress: Progress) -> None:
    """Write weights and side files as they are, and the config, the grouped class, the plan and the card anew."""
    rewrite(checkpoint, staging, {}, {}, lambda name: {}, counter(progress, "write", output_bytes(checkpoint, {})))
    copy_side_files(checkpoint.path, staging)
    for name, text in remote_files(config).items():
        (staging / name).write_text(text)
    write_json(staging / "config.json", config)
    write_json(staging / "plan.json", plan.to_json())
    card = read_card(checkpoint.path)
    if card and "headfold" not in checkpoint.config:
        card = exported_card(card, Export("headfold", config, (), SAID, remote_files(config)))
    sizes = {name: site.groups.sizes for name, site in plan.sites.items()}
    write_card(staging, routed_card(card, checkpoint.path.name, plan.group, sizes, plan.calibration))


def compare_routed(teacher: Teacher, staging: Path, config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the largest difference between the outputs of the written checkpoint and of the routed model, and the tolerance.

    Raises:
        UserError: they differ by more; the output stays in `staging`.
    """
    dtype = torch.promote_types(stored_dtype(staging), torch.float32)
    sample: dict[str, Tensor] = {name: tensor[:ITEMS] for name, tensor in teacher.sample.items()}
    model: Any = teacher.model
    advance = counter(teacher.progress, "verify", 2)
    expected = compared_output(model.to(dtype), sample)
    advance(1)
    teacher.close()
    opened = open_model(staging, dtype=dtype, device=teacher.device, model_class=own_class(dict(config)))
    found = compared_output(opened, sample)
    advance(1)
    difference, tolerance = difference_and_tolerance(found, expected, dtype)
    if not difference <= tolerance:
        raise wrong_output(
            staging,
            f"expected the outputs of the routed model within {tolerance:.2g}, got a difference of {difference:.2g}",
        )
    return difference, tolerance


def _listed(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the sites of a stock class as headfold's runtime lists them.

    Raises:
        UserError: q, k and v are one tensor, for which the runtime has no form.
    """
    sites = open_source(checkpoint.path).sites
    if any("qkv" in site.weights for site in sites):
        raise UserError(
            f"{checkpoint.path}: expected q, k and v as separate tensors, got one, which takes equal groups only; route the model while "
            "it runs instead (headfold.routing)"
        )
    return [runtime_entry(site, site.num_kv_heads) for site in sites]


def _path(module: str, plan: Plan) -> str:
    """Return a listed module's path in the running model, which may have one prefix more or less."""
    ends = [path for path in plan.sites if path == module or path.endswith(f".{module}") or module.endswith(f".{path}")]
    return ends[0] if ends else module
