"""The laws of a family, on a toy model: what a literal must pass before anything is folded by it."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..calibration import collect
from ..core.equivalents import random_equivalent, repeated_random_equivalent
from ..core.groups import Groups
from ..core.heads import Heads, KeyFreedom
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..families.folded import folded_config
from ..families.layout import check_shapes, renamed, write_heads
from ..families.spec import Family, Site
from ..hf_models import quiet
from ..planning import make_plan
from ..surgery import site_tensors
from .candidate import UNSEEN, Specimen, Trial, distance, keys, only_at, ruined
from .toy import Subject, Unproven, answer, in_float64, logits, sharpen, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COPIES = 2
EQUAL = 1e-6
"""Largest difference of the logits of two models that are the same function: one may have made its tables in float32."""


def prove_laws(subject: Subject, family: Family) -> dict[str, float]:
    """Every law, on a toy model of one K/V head per query head and on one of other sizes that is grouped already.

    Returned is how far the logits moved under each, relative to the largest; 0 where a law asks for the same bits; of
    what must be seen, the least.

    Raises:
        Unproven: the first law that does not hold.
    """
    trial = Specimen.of(subject).under(family)
    square = subject.geometry.width == subject.geometry.num_heads * subject.geometry.head_dim
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "width": 64 if square else 96}
    other = Specimen.of(subject.with_geometry(**sizes), seed=1).under(family)
    moved = {}
    for name, law in _LAWS.items():
        for model in (trial, other):
            found = law(family, model)
            moved[name] = (min if law is lies_seen else max)(moved.get(name, found), found)
    return moved


def _refuse(law: str, moved: float) -> None:
    if moved > EQUAL:
        raise Unproven(f"law broken: {law} (the logits move by {moved:.2g} of the largest, {EQUAL:g} allowed)")


def bits_return(family: Family, trial: Trial) -> float:
    """What is read is written back bit by bit, and the shapes are the config's."""
    del family
    tensors = trial.specimen.tensors
    for site in trial.sites:
        check_shapes(site, lambda name: tuple(tensors[name].shape), "toy model")
        for name, tensor in write_heads(site, trial.heads(site)).items():
            if not torch.equal(tensor, tensors[name]):
                raise Unproven(f"law broken: {name} is not written back as it was read")
    return 0.0


def all_heads_kept(family: Family, trial: Trial) -> float:
    """A fold to as many heads as there are gives the same logits bit by bit, under the stock class."""
    plan = make_plan(list(trial.sites), trial.specimen.tensors.__getitem__, "1/1", source="toy", merge="mean")
    kept = _stock(family, trial, _folded(trial, plan, None), plan.num_kv_heads, plainly=True)
    # The specimen may hold tables that were made in float64 by now: if it differs, a fresh one is asked.
    if not torch.equal(kept, _plainly(trial.specimen.model)) and not torch.equal(
        kept, _stock(family, trial, {}, {}, plainly=True)
    ):
        raise Unproven("law broken: a fold that keeps all heads changes the logits")
    return 0.0


def disguise_unseen(family: Family, trial: Trial) -> float:
    """Attention cannot see what `key_freedom` and `query_order` allow."""
    del family
    moved = trial.shows(random_equivalent)
    if moved > UNSEEN:
        raise Unproven(f"law broken: a disguise by the freedom claimed moves the logits by {moved:.2g} of the largest")
    return moved


def lies_seen(family: Family, trial: Trial) -> float:
    """Attention does see what the literal forbids: nothing more is free than it says. Returned is the least that a lie shows."""
    del family
    shown = [trial.shows(only_at(index, ruined)) for index in range(len(trial.sites))]
    for index, site in enumerate(trial.sites):
        for claim in forbidden(site.key_freedom, site.head_dim):
            shown.append(trial.shows(only_at(index, keys(claim))))
            if shown[-1] <= UNSEEN:
                raise Unproven(f"law broken: {site.name} leaves more of K free than claimed ({claim})")
    return min(shown)


def forbidden(freedom: KeyFreedom, head_dim: int) -> list[KeyFreedom]:
    """Claims that are wrong where `freedom` is all there is. Under norms layers without position may leave more signs free."""
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


def grouped_is_twin(family: Family, trial: Trial) -> float:
    """A grouped checkpoint, as the stock class loads it, says what its head-repeated twin says."""

    def grouped(heads: Heads, index: int) -> Heads:
        del index
        num = heads.num_kv_heads // COPIES
        shared = Groups.contiguous(heads.num_heads, num)
        return replace(heads, k=heads.k[:num], v=heads.v[:num], groups=shared)

    twin = trial.compared_output(lambda heads, i: grouped(heads, i).expand(heads.num_kv_heads))
    counts = {site.name: site.num_kv_heads // COPIES for site in trial.sites}
    moved = distance(_stock(family, trial, trial.changed(grouped), counts), twin)
    _refuse("the grouped checkpoint is not its head-repeated twin", moved)
    return moved


def known_answer(family: Family, trial: Trial) -> float:
    """K/V heads that were written twice, each copy in a disguise of its own, are found and made one again without loss."""

    def hidden(heads: Heads, index: int) -> Heads:
        num = heads.num_kv_heads // COPIES
        shared = Groups.contiguous(heads.num_heads, num)
        few = replace(heads, k=heads.k[:num], v=heads.v[:num], groups=shared)
        return repeated_random_equivalent(few, COPIES, index)

    inside = {**trial.specimen.tensors, **trial.changed(hidden)}
    with trial.installed_heads(trial.changed(hidden)) as model:
        answer = logits(model)
        with in_float64(model):
            stats = collect(model, list(trial.sites), {"input_ids": tokens(6, 16, seed=1)})
    plan = make_plan(
        list(trial.sites), inside.__getitem__, f"1/{COPIES}", source="toy", group="swap", merge="absorb", stats=stats
    )
    tensors = _folded(trial, plan, stats, inside)
    moved = distance(_stock(family, trial, tensors, plan.num_kv_heads), answer)
    _refuse("heads hidden as disguised copies do not come back", moved)
    return moved


def _folded(
    trial: Trial, plan: Plan, stats: Mapping[str, SiteStats] | None, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    read = (tensors or trial.specimen.tensors).__getitem__
    made = {}
    for site in trial.sites:
        made |= site_tensors(site, plan, read, stats)
    return made


def _stock(
    family: Family, trial: Trial, tensors: Mapping[str, Tensor], counts: Mapping[str, int], *, plainly: bool = False
) -> Tensor:
    """Logits of the specimen with other tensors and counts, written to disk and opened as a user would."""
    with tempfile.TemporaryDirectory(prefix="headfold-probe-") as name:
        directory = Path(name)
        written = _write(family, trial, tensors, counts, directory)
        model = _open(directory, trial, written)
    return _plainly(sharpen(model)) if plainly else logits(sharpen(model))


@torch.no_grad()
def _plainly(model: "PreTrainedModel") -> Tensor:
    """As it is, its float32 norms and all."""
    return answer(model)


def _write(
    family: Family, trial: Trial, tensors: Mapping[str, Tensor], counts: Mapping[str, int], directory: Path
) -> list[Site]:
    """The checkpoint; returned are the sites that the stock class cannot hold."""
    every = {**trial.specimen.tensors, **tensors}
    foreign = [
        site
        for site in trial.sites
        if not site.stock_gqa and counts.get(site.name, site.num_kv_heads) != site.num_kv_heads
    ]
    for site in foreign:
        for gone in renamed(site, counts[site.name]):
            del every[gone]
    # A class without a count of K/V heads keeps its own shapes, and needs the runtime only where these change.
    folded = [site for site in trial.sites if site.stock_gqa or site in foreign]
    kept = {site.name: counts[site.name] for site in folded if site.name in counts}
    config = folded_config(family, trial.specimen.config, folded, kept) if kept else trial.specimen.config
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in every.items()}, directory / "model.safetensors", {"format": "pt"})
    return foreign


def _open(directory: Path, trial: Trial, foreign: list[Site]) -> "PreTrainedModel":
    """The stock class, or the grouped one made from it where that has no count of K/V heads."""
    stock = type(trial.specimen.model)
    opened, options = stock, {"experts_implementation": "eager"}
    if foreign:
        from ..runtime.modeling_headfold import grouped_class

        opened, options = grouped_class(stock.__name__), {}
    with quiet():
        model, info = opened.from_pretrained(directory, dtype=torch.float64, output_loading_info=True, **options)
    wrong = [name for problem in ("missing_keys", "mismatched_keys") for name in info[problem]]
    if wrong:
        raise Unproven(f"law broken: a grouped checkpoint does not load ({wrong[0]})")
    return model.eval()


_LAWS: dict[str, Callable[[Family, Trial], float]] = {
    "what is read is written back": bits_return,
    "keeping all heads changes nothing": all_heads_kept,
    "what is free is unseen": disguise_unseen,
    "what is not free is seen": lies_seen,
    "grouped equals its head-repeated twin": grouped_is_twin,
    "hidden heads come back": known_answer,
}
