"""Settle a route on a folded checkpoint: measure its keys, fix who reads what, write that as an ordinary checkpoint, compare."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import calibration as calibrating
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import JOB, commit, copy_side_files, disown, job_key, open_staging, refuse_overlap, write_json
from ..checkpoint.writer import output_bytes, rewrite
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.plan import Plan, SitePlan
from ..evaluate.verify import compared_output, difference_and_tolerance
from ..export.card import exported_card
from ..export.pieces import Export
from ..families.folded import runtime_entry
from ..families.spec import Family
from ..hf_models import exceeds_memory, open_model, stored_dtype
from ..report.card import routed_card
from ..runtime import routing
from ..runtime.load import check, own_class
from ..runtime.remote import auto_map, remote_files
from .measuring import CalibrationData, Teacher, default_device
from .source import Progress, Source, open_source, silent
from .verifying import ITEMS

SAID = "query heads are cut unevenly, which the grouped class beside the weights reads (`modeling_headfold.py`)"


@dataclass(frozen=True, slots=True)
class RouteResult:
    """What a settled route is. `difference` and `tolerance` are of what the model says, absolute."""

    out: Path
    route: str
    batch_dependent: bool
    """Whether the route depended on the batch, outside training, before it was settled; afterwards none does."""
    sizes: Mapping[str, tuple[int, ...]]
    """Query heads of each K/V head, by attention."""
    calibration: Mapping[str, str]
    difference: float
    tolerance: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"out": str(self.out)}


def route(
    folded: str | Path,
    out: str | Path,
    *,
    route: str = "kdgqa",
    calibration: str | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> RouteResult:
    """Write the grouped checkpoint `folded` again as `out`, its query heads divided among K/V heads as `route` finds on data.

    The weights stay as they are, byte for byte; config.json says who reads what, plan.json too. Calibration data is named as for `fold`.
    The result is opened again, and must say what the routed model says.

    Raises:
        UserError: no grouped checkpoint, no such route or data, a route that leaves a K/V head without a query, an output that
            says something else than the routed model.
    """
    refuse_overlap(Path(folded), Path(out))
    method = routing.parse(route)
    source = _open(Path(folded))
    data = CalibrationData.chosen(source, calibration, tokens, items, tuple(columns), context, seed)
    settings = {
        "version": version("headfold"),
        "source": source.checkpoint.fingerprint(),
        "route": str(method),
        "data": asdict(data),
    }
    key = job_key(settings)
    staging = open_staging(Path(out), key, force)
    run = Teacher(source, data, device or default_device(), progress or silent)
    with _worth_keeping(staging):
        plan = _settled(run, method, seed)
        config = _config(source.checkpoint, plan)
    plan = replace(plan, sites=_every_site(plan, config))
    _write(source.checkpoint, staging, config, plan, run.progress)
    _write_card(source.checkpoint, staging, config, plan)
    difference, tolerance = _compare(run, staging, config)
    commit(staging, Path(out), force)
    sizes = {name: site.groups.sizes for name, site in plan.sites.items()}
    depends = routing.depends_on_batch(method)
    return RouteResult(Path(out), str(method), depends, sizes, plan.calibration, difference, tolerance, run.notes)


def _open(folded: Path) -> Source:
    """The checkpoint as calibration needs it; its attentions are found in the running model."""
    check(folded)
    checkpoint = Checkpoint.open(folded)
    if exceeds_memory(checkpoint, torch.promote_types(stored_dtype(folded), torch.float32)):
        raise UserError(f"{folded}: expected a model that fits into memory, to run it routed; use a larger machine")
    return Source(str(folded), checkpoint, Family(()), [])


@contextmanager
def _worth_keeping(staging: Path) -> Iterator[None]:
    """After a refusal, remove a staging directory that has nothing in it yet."""
    try:
        yield
    except UserError:
        if [path.name for path in staging.iterdir()] == [JOB]:
            shutil.rmtree(staging)
        raise


def _settled(run: Teacher, method: Any, seed: int) -> Plan:
    """The route attached to the running model, measured on the calibration data, and frozen."""
    routing.attach(run.model, str(method), seed=seed)
    total, done = calibrating.total_tokens(run.sample), 0

    def batches() -> Iterator[Mapping[str, Tensor]]:
        nonlocal done
        for batch in calibrating.batches(run.sample):
            yield batch
            done += calibrating.num_tokens(batch)
            run.progress("route", done, total)

    routing.freeze(run.model, batches())
    return routing.frozen_plan(run.model, run.source.checkpoint.fingerprint(), run.facts())


def _config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The config with the groups of the plan at its sites, which a stock class's config gets listed for that."""
    config = checkpoint.config
    listed = config["headfold"]["sites"] if "headfold" in config else _listed(checkpoint, plan)
    sites = [{name: value for name, value in site.items() if name != "kv_of_query"} for site in listed]
    old = [site.get("kv_of_query") for site in listed]
    for site, before in zip(sites, old, strict=True):
        planned = plan.sites.get(_path(site["module"], plan))
        kv_of_query = before if planned is None else list(planned.groups.group_of_head)
        if kv_of_query is not None and not Groups(tuple(kv_of_query)).is_contiguous:
            site["kv_of_query"] = kv_of_query
    made = {**config, "headfold": {**config.get("headfold", {}), "sites": sites}}
    return {**made, "auto_map": auto_map(made)}


def _listed(checkpoint: Checkpoint, plan: Plan) -> list[dict[str, Any]]:
    """The sites of a stock class as the runtime lists them.

    Raises:
        UserError: q, k and v are one tensor, which headfold's runtime has no form for.
    """
    sites = open_source(checkpoint.path).sites
    if any("qkv" in site.weights for site in sites):
        raise UserError(
            f"{checkpoint.path}: q, k and v are one tensor on disk, which takes equal groups alone; route it while it runs instead "
            "(headfold.runtime.routing)"
        )
    return [runtime_entry(site, site.num_kv_heads) for site in sites]


def _path(module: str, plan: Plan) -> str:
    """A listed module by its path in the running model: with a head or without it, one prefix more or less."""
    ends = [path for path in plan.sites if path == module or path.endswith(f".{module}") or module.endswith(f".{path}")]
    return ends[0] if ends else module


def _every_site(plan: Plan, config: Mapping[str, Any]) -> dict[str, SitePlan]:
    """By module as the config lists them, those without a choice too."""
    sites = {}
    for site in config["headfold"]["sites"]:
        own = Groups(tuple(site.get("kv_of_query") or Groups.contiguous(site["heads"], site["kv_heads"]).group_of_head))
        kept = SitePlan(own, "route", site["head_dim"] * site.get("slots", 1))
        sites[site["module"]] = plan.sites.get(_path(site["module"], plan), kept)
    return sites


def _write(checkpoint: Checkpoint, staging: Path, config: dict[str, Any], plan: Plan, progress: Progress) -> None:
    """Weights and all that lies beside them as they are, the config, the grouped class, the plan."""
    rewrite(checkpoint, staging, {}, {}, lambda name: {}, _counting(progress, "write", output_bytes(checkpoint, {})))
    copy_side_files(checkpoint.path, staging)
    for name, text in remote_files(config).items():
        (staging / name).write_text(text)
    write_json(staging / "config.json", config)
    write_json(staging / "plan.json", plan.to_json())


def _counting(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return advance


def _write_card(checkpoint: Checkpoint, staging: Path, config: Mapping[str, Any], plan: Plan) -> None:
    path = checkpoint.path / "README.md"
    card = path.read_text() if path.is_file() else ""
    if card and "headfold" not in checkpoint.config:
        card = exported_card(card, Export("headfold", config, (), SAID[0].upper() + SAID[1:], remote_files(config)))
    sizes = {name: site.groups.sizes for name, site in plan.sites.items()}
    (staging / "README.md").write_text(routed_card(card, checkpoint.path.name, plan.group, sizes, plan.calibration))


def _compare(run: Teacher, staging: Path, config: Mapping[str, Any]) -> tuple[float, float]:
    """Largest difference of what the output says from what the routed model does, and the tolerance, absolute as for folds.

    Raises:
        UserError: they differ; the output is left as `OUT.partial`.
    """
    dtype = torch.promote_types(stored_dtype(staging), torch.float32)
    sample = {name: tensor[:ITEMS] for name, tensor in run.sample.items()}
    expected = compared_output(run.model.to(dtype), sample)
    run.close()
    run.progress("verify", 0, 1)
    found = compared_output(open_model(staging, dtype=dtype, device=run.device, model_class=own_class(config)), sample)
    run.progress("verify", 1, 1)
    difference, tolerance = difference_and_tolerance(found, expected, dtype)
    if not difference <= tolerance:
        disown(staging)
        raise UserError(
            f"{staging}: expected what the routed model says within {tolerance:.2g}, got a difference of {difference:.2g}; not renamed"
        )
    return difference, tolerance
