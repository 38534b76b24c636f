"""Mean folds of tiny models by groups of every sort, with WGQA attached."""

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny import answer_of, tiny_checkpoint, tiny_sample
from torch import Tensor, nn
from transformers import PreTrainedModel

import headfold
from headfold.conversion.source import Source, open_source
from headfold.core.groups import Groups
from headfold.core.plan import Plan, SitePlan
from headfold.families.layout import read_heads
from headfold.families.spec import Site
from headfold.train import wgqa

GROUPS = {
    "llama": (0, 1, 1, 0, 0, 1, 0, 1),
    "llama-bias-gqa": (0, 1, 0, 1),  # on top of two queries for each K/V head
    "qwen3": (0, 0, 1, 1, 0, 0, 1, 1),
    "t5": (0, 1, 2, 0, 1, 2, 0, 0),
    "vit": (0, 1, 1, 0),
    "dinov2": (0, 0, 0, 0),
    "gpt2": (0, 1, 1, 0, 0, 1, 0, 1),
    "opt": (0, 1, 2, 3, 0, 1, 2, 3),
    "whisper": (0, 1, 2, 2, 2, 2, 1, 0),
    "falcon-rotary": (0, 0, 1, 1, 1, 1, 0, 0),
    "bloom": (0, 0, 0, 0, 1, 1, 1, 1),
}
"""K/V head of the source → that of the fold. Stock classes and our own; biases on all, some or none; d_kv · heads other than d_model;
projections that are fused, transposed or renamed; groups of neighbours and others, equal and not."""


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="headfold-wgqa-")


@functools.cache
def fold_of(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> tuple[Source, Path]:
    """The tiny original, and the directory of its mean fold by the groups above."""
    source, target = tiny_checkpoint(name, dtype, **overrides), Path(_root().name) / f"{name}{dtype}{overrides}"
    opened = open_source(source)
    rows = {site.name: SitePlan(Groups(GROUPS[name]), "mean", site.head_dim) for site in opened.sites}
    plan = Plan(rows, "contiguous", opened.checkpoint.fingerprint())
    target.with_suffix(".json").write_text(json.dumps(plan.to_json()))
    layout = None if Groups(GROUPS[name]).is_even else "headfold"
    headfold.fold(source, target, plan=target.with_suffix(".json"), refit=False, verify=False, layout=layout)
    return opened, target


def load(directory: Path) -> PreTrainedModel:
    # A copy, because products of memory-mapped weights may round otherwise: they are not aligned.
    return copy.deepcopy(headfold.load(directory))


def attach(model: PreTrainedModel, fold: tuple[Source, Path], spec: str, seed: int = 0) -> wgqa.Options:
    source, target = fold
    plan = Plan.load(target / "plan.json")
    return wgqa.attach(model, source.sites, plan, source.checkpoint.read, spec, seed=seed)


def attached(name: str, spec: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    fold = fold_of(name, **overrides)
    model = load(fold[1])
    attach(model, fold, spec, seed)
    return model


def answer(model: PreTrainedModel, name: str) -> Tensor:
    with torch.no_grad():
        return answer_of(model, tiny_sample(name)).clone()


def backward(model: nn.Module, name: str) -> None:
    """Gradients of a random functional of what the model says."""
    said = model(**tiny_sample(name)).logits.flatten()
    (said @ torch.randn(len(said), dtype=said.dtype, generator=torch.Generator().manual_seed(7))).backward()


def linears(model: PreTrainedModel, name: str) -> Iterator[tuple[Site, str, nn.Linear, Tensor]]:
    """K's and V's, each with the original's heads (head, dim, model + 1)."""
    source, _ = fold_of(name)
    for site in source.sites:
        heads = read_heads(site, source.checkpoint.read)
        for role in "kv":
            path = site.paths.get(role, f"{site.core}.{role}_proj")
            yield site, role, model.get_submodule(path), getattr(heads, role)
