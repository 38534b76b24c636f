"""Sites without energy or with too much of it: every method returns finite heads, and the default fold is made."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_sites import RandomSite, random_site
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint
from torch import Tensor

import headfold
from headfold import merge as merges
from headfold.core import plugins
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.methods import CostMethod
from headfold.group import costs

# ruff: noqa: F811 - fixtures are arguments

SITES: dict[str, Callable[[RandomSite], RandomSite]] = {
    **{
        f"no {role}": lambda site, role=role: replace(
            site, heads=replace(site.heads, **{role: torch.zeros_like(getattr(site.heads, role))})
        )
        for role in ("q", "k", "v", "o")
    },
    "inputs of zero": lambda site: replace(site, x=torch.zeros_like(site.x)),
    "one input": lambda site: replace(site, x=site.x[:1, :1].expand_as(site.x)),
    "one head of zero": lambda site: replace(
        site, heads=replace(site.heads, k=_without_first(site.heads.k), v=_without_first(site.heads.v))
    ),
}
EVERY_SITE = pytest.mark.parametrize("change", SITES.values(), ids=[*SITES])
FREEDOM = pytest.mark.parametrize("freedom", ["halves", "no position", "normed pairs", "partial halves"])


def _without_first(rows: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(rows[:1]), rows[1:]])


@pytest.mark.parametrize("name", [*plugins.names(merges), "procrustes:norm=true"])
@FREEDOM
@EVERY_SITE
def test_merged_heads_are_finite_in_float32(
    name: str, freedom: str, change: Callable[[RandomSite], RandomSite]
) -> None:
    for bias in (True, False):
        site = change(random_site(freedom, 4, 2, bias=bias))
        heads = merges.parse_merge(name)(site.heads, Groups.contiguous(4, 2), site.stats, seed=0)
        for role in ("q", "k", "v", "o"):
            assert getattr(heads, role).float().isfinite().all()


@pytest.mark.parametrize("name", plugins.names(costs))
@FREEDOM
@EVERY_SITE
def test_costs_are_finite(name: str, freedom: str, change: Callable[[RandomSite], RandomSite]) -> None:
    site = change(random_site(freedom, 4, 2))
    cost = plugins.load(costs, name, CostMethod).cost(site.heads, site.stats)
    assert torch.tensor([float(cost(members)) for members in ((0, 1), (1, 2, 3), (0, 1, 2, 3))]).isfinite().all()


def _named(tensors: dict[str, Tensor], part: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(tensor) if part in name else tensor for name, tensor in tensors.items()}


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "norms of zero": lambda tensors: _named(tensors, "norm", torch.zeros_like),
    "embeddings of zero": lambda tensors: _named(tensors, "embed", torch.zeros_like),
    "keys of zero": lambda tensors: _named(tensors, "k_proj", torch.zeros_like),
    "one value": lambda tensors: _named(tensors, "v_proj", lambda tensor: torch.full_like(tensor, 0.5)),
    "values of 1e30": lambda tensors: _named(tensors, "v_proj", lambda tensor: tensor * 1e30),
    "values of 1e-30": lambda tensors: _named(tensors, "v_proj", lambda tensor: tensor * 1e-30),
    "as they are": lambda tensors: tensors,
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=[*WEIGHTS])
@pytest.mark.parametrize("name", ["llama-bias-gqa", "qwen3"])
def test_the_default_fold_is_made_of_any_finite_weights(
    name: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """In bf16, on one repeated token."""
    source = readable_checkpoint(tmp_path / "source", tokenizer, name)
    tensors = {
        key: tensor.to(torch.bfloat16) for key, tensor in change(load_file(source / "model.safetensors")).items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text("a" * 3000)
    made = headfold.fold(
        source, tmp_path / "out", kv_heads=2, calibration=str(tmp_path / "text.txt"), tokens=256, context=32
    )
    assert made.verification.passed
    assert all(tensor.isfinite().all() for tensor in load_file(made.out / "model.safetensors").values())


@pytest.mark.parametrize("name", ["self_attn.k_proj", "input_layernorm"])
def test_inspect_names_weights_that_are_not_finite(name: str, tokenizer: Any, tmp_path: Path) -> None:
    source = readable_checkpoint(tmp_path / "source", tokenizer)
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.1.{name}.weight"].view(-1)[0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"model.layers.1.{name}.weight: 1 of \d+ elements are NaN"):
        headfold.inspect(source)
