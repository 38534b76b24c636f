"""The laws of a family, tested on toy models: what a literal must pass before anything is folded by it."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..calibration import collect
from ..core.equivalents import random_equivalent, repeated_random_equivalent
from ..core.groups import Groups
from ..core.heads import Heads, KeyFreedom
from ..core.plan import Plan
from ..core.progress import Progress, counter, no_progress
from ..core.stats import SiteStats
from ..families.folded import folded_config
from ..families.layout import check_shapes, renamed, write_heads
from ..families.spec import Family, Site
from ..hf_models import quiet
from ..planning import make_plan
from ..surgery import site_tensors
from ..trusted_code import trusted_code
from .candidate import TOLERANCE, Candidate, distance, keys, only_at, reversed_keys
from .toy import Architecture, ToyModel, Unproven, in_float64, logits, output_of, sharpen, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COPIES = 2
"""Number of copies of each K/V head in the test of repeated heads."""
TWIN_TOLERANCE = 1e-6
"""Largest difference of the logits of two models that are the same function: one may have computed its tables in float32."""


def prove_laws(architecture: Architecture, family: Family, progress: Progress = no_progress) -> dict[str, float]:
    """Test every law on a toy model with one K/V head per query head, and on one of other sizes that is grouped already.

    Returns the change of the logits under each law, relative to the largest: 0 where a law requires the same bits, and the least
    change where a law requires one.

    Raises:
        Unproven: names the first law that does not hold.
    """
    candidate = Candidate.of(ToyModel.of(architecture), family)
    square = architecture.geometry.hidden_size == architecture.geometry.num_heads * architecture.geometry.head_dim
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 64 if square else 96}
    other = Candidate.of(ToyModel.of(architecture.with_geometry(**sizes), seed=1), family)
    moved: dict[str, float] = {}
    advance = counter(progress, "laws", len(_LAWS))
    for name, law in _LAWS.items():
        for model in (candidate, other):
            found = law(family, model)
            moved[name] = (min if law is forbidden_changes_logits else max)(moved.get(name, found), found)
        advance(1)
    return moved


def _refuse(law: str, moved: float) -> None:
    if moved > TWIN_TOLERANCE:
        raise Unproven(
            f"law broken: {law} (the logits change by {moved:.2g} of the largest, {TWIN_TOLERANCE:g} is allowed)"
        )


def round_trip(family: Family, candidate: Candidate) -> float:
    """Check that tensors are written back bit by bit as they were read, and that shapes are those of the config."""
    del family
    tensors = candidate.toy_model.tensors
    for site in candidate.sites:
        check_shapes(site, lambda name: tuple(tensors[name].shape), "toy model")
        for name, tensor in write_heads(site, candidate.heads(site)).items():
            if not torch.equal(tensor, tensors[name]):
                raise Unproven(f"law broken: {name} is not written back as it was read")
    return 0.0


def all_heads_kept(family: Family, candidate: Candidate) -> float:
    """Check that a fold to as many heads as before gives the same logits bit by bit under the stock class."""
    plan = make_plan(list(candidate.sites), candidate.toy_model.tensors.__getitem__, "1/1", source="toy", merge="mean")
    kept = _logits_from_disk(family, candidate, _folded(candidate, plan, None), plan.num_kv_heads, as_loaded=True)
    # By now the toy model may have tables that were computed in float64: if it differs, compare with a new one.
    if not torch.equal(kept, _logits_as_loaded(candidate.toy_model.model)) and not torch.equal(
        kept, _logits_from_disk(family, candidate, {}, {}, as_loaded=True)
    ):
        raise Unproven("law broken: a fold that keeps all heads changes the logits")
    return 0.0


def freedom_keeps_logits(family: Family, candidate: Candidate) -> float:
    """Check that transformations allowed by `key_freedom` and `query_order` do not change the logits."""
    del family
    moved = candidate.logit_change(random_equivalent)
    if moved > TOLERANCE:
        raise Unproven(
            f"law broken: a transformation that the claimed freedom allows changes the logits by {moved:.2g} of the largest"
        )
    return moved


def forbidden_changes_logits(family: Family, candidate: Candidate) -> float:
    """Check that transformations that the literal forbids change the logits, so that nothing more is free; return the least
    change."""
    del family
    shown = [candidate.logit_change(only_at(index, reversed_keys)) for index in range(len(candidate.sites))]
    for index, site in enumerate(candidate.sites):
        for claim in forbidden(site.key_freedom, site.head_dim):
            shown.append(candidate.logit_change(only_at(index, keys(claim))))
            if shown[-1] <= TOLERANCE:
                raise Unproven(f"law broken: {site.name}: more of K is free than claimed ({claim})")
    return min(shown)


def forbidden(freedom: KeyFreedom, head_dim: int) -> list[KeyFreedom]:
    """Return claims that are wrong if `freedom` is exactly right. Under norms, more signs may be free in layers without position."""
    if freedom.kind == "any":
        return []
    if freedom.normed:
        return [KeyFreedom("any"), replace(freedom, kind="rope-pairs" if freedom.interleaved else "rope-halves")]
    wrong = [KeyFreedom("any")]
    if freedom.rotary_dim > 2:
        wrong.append(replace(freedom, interleaved=not freedom.interleaved))
        wrong.append(replace(freedom, rotary_dim=freedom.rotary_dim - 2))
    if freedom.rotary_dim < head_dim and not freedom.interleaved:
        wrong.append(replace(freedom, rotary_dim=head_dim))
    return wrong


def grouped_equals_twin(family: Family, candidate: Candidate) -> float:
    """Check that a grouped checkpoint, loaded by the stock class, gives the logits of its head-repeated twin."""

    def grouped(heads: Heads, index: int) -> Heads:
        del index
        num = heads.num_kv_heads // COPIES
        shared = Groups.contiguous(heads.num_heads, num)
        return replace(heads, k=heads.k[:num], v=heads.v[:num], groups=shared)

    twin = candidate.logits_with(lambda heads, i: grouped(heads, i).expand(heads.num_kv_heads))
    counts = {site.name: site.num_kv_heads // COPIES for site in candidate.sites}
    moved = distance(_logits_from_disk(family, candidate, candidate.changed_tensors(grouped), counts), twin)
    _refuse("the grouped checkpoint is not its head-repeated twin", moved)
    return moved


def repeated_heads_merge(family: Family, candidate: Candidate) -> float:
    """Check that K/V heads written twice, each copy transformed differently, are grouped and merged without loss."""

    def hidden(heads: Heads, index: int) -> Heads:
        num = heads.num_kv_heads // COPIES
        shared = Groups.contiguous(heads.num_heads, num)
        few = replace(heads, k=heads.k[:num], v=heads.v[:num], groups=shared)
        return repeated_random_equivalent(few, COPIES, index)

    inside = {**candidate.toy_model.tensors, **candidate.changed_tensors(hidden)}
    with candidate.installed_heads(candidate.changed_tensors(hidden)) as model:
        expected = logits(model)
        with in_float64(model):
            stats = collect(model, list(candidate.sites), {"input_ids": tokens(6, 16, seed=1)})
    plan = make_plan(
        list(candidate.sites),
        inside.__getitem__,
        f"1/{COPIES}",
        source="toy",
        group="swap",
        merge="absorb",
        stats=stats,
    )
    tensors = _folded(candidate, plan, stats, inside)
    moved = distance(_logits_from_disk(family, candidate, tensors, plan.num_kv_heads), expected)
    _refuse("repeated heads, each transformed differently, are not merged without loss", moved)
    return moved


def _folded(
    candidate: Candidate, plan: Plan, stats: Mapping[str, SiteStats] | None, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    read = (tensors or candidate.toy_model.tensors).__getitem__
    made: dict[str, Tensor] = {}
    for site in candidate.sites:
        made |= site_tensors(site, plan, read, stats)
    return made


def _logits_from_disk(
    family: Family,
    candidate: Candidate,
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, int],
    *,
    as_loaded: bool = False,
) -> Tensor:
    """Return the logits of the toy model with other tensors and counts, written to disk and opened as a user would."""
    with tempfile.TemporaryDirectory(prefix="headfold-detect-") as name:
        directory = Path(name)
        written = _write(family, candidate, tensors, counts, directory)
        model = _open(directory, candidate, written)
    return _logits_as_loaded(sharpen(model)) if as_loaded else logits(sharpen(model))


@torch.no_grad()
def _logits_as_loaded(model: "PreTrainedModel") -> Tensor:
    """Return the model's output in its own dtypes, with its float32 norms."""
    return output_of(model)


def _write(
    family: Family, candidate: Candidate, tensors: Mapping[str, Tensor], counts: Mapping[str, int], directory: Path
) -> list[Site]:
    """Write the checkpoint; return the sites that the stock class cannot load."""
    every = {**candidate.toy_model.tensors, **tensors}
    needs_runtime = [
        site
        for site in candidate.sites
        if not site.stock_gqa and counts.get(site.name, site.num_kv_heads) != site.num_kv_heads
    ]
    for site in needs_runtime:
        for removed in renamed(site, counts[site.name]):
            del every[removed]
    # A class without a count of K/V heads keeps its own shapes, and needs the runtime only where these change.
    folded = [site for site in candidate.sites if site.stock_gqa or site in needs_runtime]
    kept = {site.name: counts[site.name] for site in folded if site.name in counts}
    config = folded_config(family, candidate.toy_model.config, folded, kept) if kept else candidate.toy_model.config
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in every.items()}, directory / "model.safetensors", {"format": "pt"})
    return needs_runtime


def _open(directory: Path, candidate: Candidate, needs_runtime: list[Site]) -> "PreTrainedModel":
    """Open the stock class or, if it has no count of K/V heads, the grouped class derived from it."""
    stock = type(candidate.toy_model.model)
    opened: Any = stock
    options = {"experts_implementation": "eager"}
    if needs_runtime:
        from ..runtime.modeling_headfold import grouped_class

        if trusted_code(candidate.toy_model.config["model_type"]) is not None:
            raise Unproven(
                f"{stock.__name__} reads no count of K/V heads from its config, and headfold writes no grouped class for code that a "
                "checkpoint brings"
            )

        opened, options = grouped_class(stock.__name__), {}
    with quiet():
        loaded: Any = opened.from_pretrained(directory, dtype=torch.float64, output_loading_info=True, **options)
    model, info = loaded
    wrong = [name for problem in ("missing_keys", "mismatched_keys") for name in info[problem]]
    if wrong:
        raise Unproven(f"law broken: a grouped checkpoint does not load ({wrong[0]})")
    return model.eval()


_LAWS: dict[str, Callable[[Family, Candidate], float]] = {
    "tensors are written back as they were read": round_trip,
    "keeping all heads changes nothing": all_heads_kept,
    "allowed transformations keep the logits": freedom_keeps_logits,
    "other transformations change the logits": forbidden_changes_logits,
    "a grouped model equals its head-repeated twin": grouped_equals_twin,
    "repeated heads are merged without loss": repeated_heads_merge,
}
