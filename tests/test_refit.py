"""Refitting W_o brings every attention's answer nearer to the original's, and nowhere else."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight_through_float32_norms
from safetensors.torch import load_file
from tiny import stock_model, tiny_checkpoint, tiny_sites, tiny_tokens
from torch import Tensor

from headfold import calibration
from headfold.calibration import collect
from headfold.families.spec import Site
from headfold.planning import make_plan
from headfold.refine.refit import refit
from headfold.stock import is_streamed, open_model
from headfold.surgery import site_tensors

FAMILIES = ["llama", "llama-bias-gqa", "phi", "phi3", "qwen3", "cohere", "starcoder2", "mixtral"]
WITH_OUTPUT_BIAS = ["llama-bias-gqa", "phi", "cohere", "starcoder2"]
BATCHES = [tiny_tokens(4, 16, seed=1), tiny_tokens(4, 16, seed=2), tiny_tokens(3, 16, seed=3)]
"""The last is smaller, as the last batch of a real run is."""
SAMPLE = {"input_ids": torch.cat(BATCHES)}
SMALL, INFINITE = 1e-4, 1e30


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", BATCHES[0].numel())


@dataclass(frozen=True, slots=True)
class Folded:
    """A tiny source and the tensors of its head-repeated twin by site."""

    directory: Path
    sites: list[Site]
    merged: Mapping[str, Mapping[str, Tensor]]

    def refit(self, ridge: float, memory_limit: int | None = None) -> dict[str, Tensor]:
        model = open_model(self.directory, dtype=torch.float64, memory_limit=memory_limit)
        assert is_streamed(model) == (memory_limit == 0)
        return refit(model, self.sites, lambda site: self.merged[site.name], SAMPLE, ridge=ridge)


@cache
def folded(name: str, merge: str = "absorb") -> Folded:
    directory = tiny_checkpoint(name)
    sites = [site for site, _ in tiny_sites(directory)]
    read = load_file(directory / "model.safetensors").__getitem__
    stats = collect(stock_model(directory), sites, SAMPLE)
    plan = make_plan(sites, read, 2, source="tiny", group="contiguous", merge=merge, stats=stats)
    twins = {site.name: site_tensors(site, plan, read, stats, num_groups=site.num_groups) for site in sites}
    return Folded(directory, sites, twins)


refitted = cache(lambda name, ridge=SMALL: folded(name).refit(ridge))


@torch.no_grad()
def answers(case: Folded, site: Site, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the original attention and one with other weights make of the original's own inputs, per token."""
    model = stock_model(case.directory)
    attention = model.get_submodule(site.module)
    calls: list[tuple[tuple, dict[str, Any], Tensor]] = []
    attention.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    for batch in BATCHES:
        model(batch, use_cache=False)
    other = copy.deepcopy(attention)
    other._forward_hooks.clear()
    local = {name.removeprefix(f"{site.module}."): tensor.double() for name, tensor in weights.items()}
    other.load_state_dict(local, strict=False)
    theirs = [other(*args, **kwargs)[0] for args, kwargs, _ in calls]
    return tuple(torch.cat([t.flatten(0, 1) for t in parts]) for parts in ([c[2] for c in calls], theirs))


def missing(case: Folded, site: Site, fitted: Mapping[str, Tensor]) -> Tensor:
    """What the merged attention, with the given output projections, still lacks."""
    own = {name: tensor for name, tensor in fitted.items() if name in case.merged[site.name]}
    original, other = answers(case, site, {**case.merged[site.name], **own})
    return original - other


def energy(rows: Tensor) -> float:
    return float(rows.square().sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_refit_lowers_the_error_of_every_block(name: str) -> None:
    case = folded(name)
    for site in case.sites:
        errors = [energy(missing(case, site, f)) for f in ({}, refitted(name, 1.0), refitted(name))]
        assert errors[2] < errors[1] < errors[0]
        assert errors[2] < 0.9 * errors[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_refit_gives_the_output_projections_alone(name: str) -> None:
    case, fitted = folded(name), refitted(name)
    expected = {f"{site.weights['o']}.{leaf}" for site in case.sites for leaf in ("weight", "bias")}
    has_bias = name in WITH_OUTPUT_BIAS
    assert fitted.keys() == {key for key in expected if has_bias or key.endswith("weight")}
    for site in case.sites:
        for key in fitted.keys() & case.merged[site.name].keys():
            assert fitted[key].shape == case.merged[site.name][key].shape
            assert fitted[key].dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_an_infinite_ridge_keeps_the_merged_projections(name: str) -> None:
    case = folded(name)
    for key, tensor in case.refit(INFINITE).items():
        merged = next(tensors[key] for tensors in case.merged.values() if key in tensors)
        assert_bitwise(tensor, merged.to(torch.float32))
        assert_differs(refitted(name)[key], merged)


@pytest.mark.parametrize("name", WITH_OUTPUT_BIAS)
@pytest.mark.parametrize("ridge", [SMALL, INFINITE])
def test_an_output_bias_takes_the_mean_error(name: str, ridge: float) -> None:
    """It is not shrunk, so nothing is left of the mean, whatever the ridge."""
    case = folded(name, "mean")
    fitted = case.refit(ridge)
    for site in case.sites:
        original, other = answers(case, site, {**case.merged[site.name], **_own(case, site, fitted)})
        assert_differs(missing(case, site, {}).mean(0) + original.mean(0), original.mean(0))
        assert_tight_through_float32_norms(other.mean(0), original.mean(0))


def _own(case: Folded, site: Site, fitted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in fitted.items() if name in case.merged[site.name]}


@pytest.mark.parametrize("name", ["llama", "phi", "phi3"])
def test_a_streamed_model_gives_the_same_refit(name: str) -> None:
    streamed, whole = folded(name).refit(SMALL, memory_limit=0), refitted(name)
    assert streamed.keys() == whole.keys()
    for key, tensor in whole.items():
        assert_bitwise(streamed[key], tensor)


def test_the_solution_is_that_of_ridge_regression_spelled_out() -> None:
    """Stationary: the change of W_o times λ is the correlation of what is still missing with what enters W_o."""
    case, ridge = folded("llama"), 1e-2
    site = case.sites[1]
    merged, fitted = case.merged[site.name], case.refit(ridge)
    key = f"{site.weights['o']}.weight"
    still = missing(case, site, fitted)
    width = merged[key].shape[1]
    # What enters W_o, read through an output projection that is the identity, a block of rows at a time.
    rows = merged[key].shape[0]
    seen = []
    for start in range(0, width, rows):
        window = torch.zeros(rows, width).double()
        window[range(min(rows, width - start)), range(start, min(start + rows, width))] = 1.0
        seen.append(answers(case, site, {**merged, key: window})[1][:, : width - start])
    a = torch.cat(seen, 1)
    damping = ridge * a.square().sum(0).mean()
    step = fitted[key].double() - merged[key]
    assert_tight_through_float32_norms(damping * step, still.T @ a)
