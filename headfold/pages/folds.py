"""Open a folded checkpoint, and the original beside it, for a page: files and headers alone, no weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.reader import Checkpoint
from ..conversion.serving_cost import serving_cost
from ..conversion.source import open_source, with_sites_of
from ..core.errors import UserError
from ..core.plan import Plan
from ..corpus.samples import kind_of
from ..families import all_families
from ..families.cached import stored_kv_bytes_per_token
from ..families.spec import sites
from ..families.wrapped import attention_type, is_of_tower, is_wrapper, language_config
from ..hf_models import stored_dtype
from ..hf_models.building import open_config
from ..reports.card import source_metadata
from ..runtime.load import read_checked_config
from ..towers import tower_sites
from .cards import card_of
from .contents import Fold, Original

PLAN = "plan.json"


def open_fold(path: Path, name: str) -> Fold:
    """Return what the files of a fold say of it.

    Raises:
        UserError: it is unfinished, its files are corrupt, or they disagree.
    """
    config = read_checked_config(path)
    if is_wrapper(config):  # published ones leave out what a class assumes
        config = open_config(config, f"{path}/config.json").to_dict()
    checkpoint, plan = Checkpoint.open(path), Plan.load(path / PLAN)
    try:
        kv_bytes = stored_kv_bytes_per_token(config, checkpoint.tensors, stored_dtype(path).itemsize)
    except (UserError, KeyError, TypeError, ArithmeticError):
        kv_bytes = None
    named = source_metadata(path).get("base_model")
    return Fold(
        path=path,
        name=name,
        kind=kind_of(config),
        base_model=named if isinstance(named, str) else "",
        card=card_of(path),
        plan=plan,
        query_heads=_query_heads(config, checkpoint, plan),
        kv_bytes_per_token=kv_bytes,
        weight_bytes=checkpoint.num_bytes,
    )


def open_original(name: str, folds: Sequence[Fold]) -> Original:
    """Return the checkpoint that all these folds were made of, with what it and they cost.

    Raises:
        UserError: it cannot be read, or a fold was made of another.
    """
    costs = {}
    source = open_source(name)
    fingerprint = source.checkpoint.fingerprint()
    for fold in folds:
        if fold.plan.source != fingerprint:
            raise UserError(
                f"--original {name}: expected the checkpoint that {fold.name} was folded from, got another (fingerprints differ); name "
                "that one, or leave --original out"
            )
        folded = with_sites_of(source, fold.plan)
        costs[fold.name] = (serving_cost(folded), serving_cost(folded, fold.plan))
    return Original(source.checkpoint.path, source.checkpoint.num_bytes, costs)


def _query_heads(config: Mapping[str, Any], checkpoint: Checkpoint, plan: Plan) -> Mapping[str, int]:
    """Return the query heads of each K/V head of the original; 1 where the config does not say how many there are."""
    family = next((one for one in all_families().values() if attention_type(config) in one.model_types), None)
    try:
        listed = sites(family, config, checkpoint.tensors) if family is not None else []
        if is_wrapper(config) and any(map(is_of_tower, plan.sites)):
            listed += tower_sites(config, checkpoint.tensors, "config.json")
    except UserError:  # a layout with other names of its tensors
        listed = []
    counted = {site.name: site.num_heads for site in listed}
    usual = language_config(config).get("num_attention_heads") or 0
    return {name: max(1, counted.get(name, usual) // site.groups.num_heads) for name, site in plan.sites.items()}
