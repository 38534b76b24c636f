"""Refitting W_o and W_v brings every attention's answer nearer to the original's, and touches nothing else."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight_through_float32_norms
from kinds import KINDS
from safetensors.torch import load_file
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_sites, tiny_tokens
from torch import Tensor

from headfold import calibration
from headfold.calibration import collect, mask_of
from headfold.core.fitted import FittedHeads
from headfold.core.heads import Heads
from headfold.core.plan import Plan
from headfold.core.stats import SiteStats
from headfold.families.spec import Site
from headfold.hf_models import open_model
from headfold.hf_models.streamed import is_streamed
from headfold.planning import make_plan
from headfold.refine import fixed_attention, queries
from headfold.refine.blocks import recorded_calls
from headfold.refine.recorded import RecordedCall, RecordedSite
from headfold.refine.refit import refit, tokens_per_block
from headfold.refine.values import refit_values
from headfold.surgery import query_order, site_heads, site_tensors

FAMILIES = ["llama", "llama-bias-gqa", "phi", "phi3", "qwen3", "cohere", "starcoder2", "mixtral"]
WITH_OUTPUT_BIAS = ["llama-bias-gqa", "phi", "cohere", "starcoder2"]
BATCHES = [tiny_tokens(4, 16, seed=1), tiny_tokens(4, 16, seed=2), tiny_tokens(3, 16, seed=3)]
"""The last is smaller, as the last batch of a real run is."""
SAMPLE = {"input_ids": torch.cat(BATCHES)}
SMALL, INFINITE = 1e-4, 1e30


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", BATCHES[0].numel())
    monkeypatch.setattr(queries, "NARROW", 0)


@dataclass(frozen=True, slots=True)
class Folded:
    """A tiny source, its statistics and a plan."""

    directory: Path
    sites: list[Site]
    plan: Plan
    read: Callable[[str], Tensor]
    stats: Mapping[str, SiteStats]

    def merged(self, site: Site) -> Heads:
        return site_heads(site, self.plan, self.read, self.stats)

    def twin(self, site: Site, refits: Mapping[str, FittedHeads] | None = None) -> dict[str, Tensor]:
        return site_tensors(site, self.plan, self.read, self.stats, refits, num_kv_heads=site.num_kv_heads)

    def refit(
        self, ridge: float, value_steps: int = 3, memory_limit: int | None = None, query_steps: int = 0, passes: int = 0
    ) -> dict[str, dict[str, Tensor]]:
        model = open_model(self.directory, dtype=torch.float64, memory_limit=memory_limit)
        assert is_streamed(model) == (memory_limit == 0)
        how = {"ridge": ridge, "value_steps": value_steps, "query_steps": query_steps, "passes": passes}
        return refit(model, self.sites, self.merged, SAMPLE, **how)


@cache
def folded(name: str, merge: str = "absorb", group: str = "contiguous", kv_heads: int = 2) -> Folded:
    directory = tiny_checkpoint(name)
    sites = [site for site, _ in tiny_sites(directory)]
    read = load_file(directory / "model.safetensors").__getitem__
    stats = collect(stock_model(directory), sites, SAMPLE)
    plan = make_plan(sites, read, kv_heads, source="tiny", group=group, merge=merge, stats=stats)
    return Folded(directory, sites, plan, read, stats)


refitted = cache(lambda name, ridge=SMALL, value_steps=3: folded(name).refit(ridge, value_steps))


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


def missing(case: Folded, site: Site, refits: Mapping[str, FittedHeads]) -> Tensor:
    """What the merged attention still lacks."""
    original, other = answers(case, site, case.twin(site, refits))
    return original - other


def energy(rows: Tensor) -> float:
    return float(rows.square().sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_refit_lowers_the_error_of_every_block(name: str) -> None:
    case = folded(name)
    for site in case.sites:
        tried = ({}, refitted(name, 1.0, 0), refitted(name, SMALL, 0), refitted(name))
        errors = [energy(missing(case, site, refits)) for refits in tried]
        assert errors[3] < 0.99 * errors[2] and errors[2] < errors[1] < errors[0]
        assert errors[2] < 0.9 * errors[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_are_refitted_whatever_norm_follows_them(name: str) -> None:
    case = folded(name)
    found = case.refit(SMALL, query_steps=3)
    for site in case.sites:
        merged, fitted = case.merged(site), found[site.name]
        assert fitted.is_complete and fitted.q is not None
        assert_differs(fitted.q, merged.q.float())
        assert_bitwise(fitted.k, merged.k.float())
        for field, tensor in fitted.to_tensors().items():
            assert tensor.shape == getattr(merged, field).shape and tensor.dtype == torch.float32
        assert energy(missing(case, site, found)) < 1.02 * energy(missing(case, site, refitted(name)))


@pytest.mark.parametrize("enough", [True, False])
def test_queries_stay_where_calibration_is_narrow(enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = folded("llama")
    inputs = case.merged(case.sites[0]).q.shape[2] - 1
    monkeypatch.setattr(queries, "NARROW", SAMPLE["input_ids"].numel() / inputs + (0 if enough else 0.01))
    found = case.refit(SMALL, query_steps=3)
    assert all(fitted.is_complete == enough for fitted in found.values())


@pytest.mark.parametrize("query_steps", [0, 3])
def test_groups_of_several_sizes_are_refitted(query_steps: int) -> None:
    case = folded("llama", "absorb", "swap:unequal=true", 3)
    found = case.refit(SMALL, query_steps=query_steps)
    for site in case.sites:
        assert not case.plan.sites[site.name].groups.is_even
        assert energy(missing(case, site, found)) < 0.9 * energy(missing(case, site, {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_refit_gives_output_projections_and_values_alone(name: str) -> None:
    case, found = folded(name), refitted(name)
    assert found.keys() == {site.name for site in case.sites}
    for site in case.sites:
        merged = case.merged(site)
        assert not found[site.name].is_complete and found[site.name].v is not None
        assert (found[site.name].o_bias is not None) == (name in WITH_OUTPUT_BIAS)
        for field, tensor in found[site.name].to_tensors().items():
            assert tensor.shape == getattr(merged, field).shape and tensor.dtype == torch.float32
        if not {"v", "qkv"} & set(site.biases):
            assert not found[site.name].v[..., -1].any()
        assert refitted(name, SMALL, 0)[site.name].v is None


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_merged_before_is_not_merged_again(name: str) -> None:
    """With complete heads given, they are those of the merge with the refitted ones put in, bit by bit."""
    case = folded(name)
    for site in case.sites:
        merged, fitted = case.merged(site), refitted(name)[site.name]
        whole = {site.name: fitted.completed(merged)}
        assert whole[site.name].is_complete and not fitted.is_complete
        again = site_heads(site, case.plan, case.read, None, whole)  # without statistics, which the merge needs
        expected = site_heads(site, case.plan, case.read, case.stats, {site.name: fitted})
        for field in ("q", "k", "v", "o"):
            assert_bitwise(getattr(again, field), getattr(expected, field))
        assert again.groups == expected.groups and again.per_head.keys() == expected.per_head.keys()
        for extra, tensor in again.per_head.items():
            assert_bitwise(tensor, expected.per_head[extra])


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_sites_are_given_away_one_by_one_and_passed_over(name: str) -> None:
    case, given = folded(name), {}
    model, first = open_model(case.directory, dtype=torch.float64), case.sites[0].name
    how: dict[str, Any] = {"ridge": SMALL, "query_steps": 0, "passes": 0}
    left = refit(model, case.sites, case.merged, SAMPLE, skip={first}, keep=given.__setitem__, **how)
    assert left == {} and given.keys() == {site.name for site in case.sites[1:]}
    for site, fitted in given.items():
        for field, tensor in fitted.to_tensors().items():
            assert_bitwise(tensor, getattr(refitted(name)[site], field))


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_an_infinite_ridge_keeps_the_merged_heads(name: str) -> None:
    case = folded(name)
    for site, fitted in case.refit(INFINITE).items():
        merged = case.merged(next(s for s in case.sites if s.name == site))
        for field, tensor in fitted.to_tensors().items():
            assert_bitwise(tensor, getattr(merged, field).to(torch.float32))
            assert_differs(getattr(refitted(name)[site], field), getattr(merged, field))


@pytest.mark.parametrize("name", WITH_OUTPUT_BIAS)
@pytest.mark.parametrize("ridge", [SMALL, INFINITE])
def test_an_output_bias_takes_the_mean_error(name: str, ridge: float) -> None:
    """It is not shrunk, so nothing is left of the mean, whatever the ridge."""
    case = folded(name, "mean")
    fitted = case.refit(ridge)
    for site in case.sites:
        original, other = answers(case, site, case.twin(site, fitted))
        assert_differs(missing(case, site, {}).mean(0) + original.mean(0), original.mean(0))
        assert_tight_through_float32_norms(other.mean(0), original.mean(0))


@pytest.mark.parametrize("name", ["llama", "phi", "phi3"])
def test_a_streamed_model_gives_the_same_refit(name: str) -> None:
    streamed, whole = folded(name).refit(SMALL, memory_limit=0), refitted(name)
    assert streamed.keys() == whole.keys()
    for site, fitted in whole.items():
        for field, tensor in fitted.to_tensors().items():
            assert_bitwise(getattr(streamed[site], field), tensor)


def test_the_solution_is_that_of_ridge_regression_spelled_out() -> None:
    """Stationary: the change of W_o times λ is the correlation of what is still missing with what enters W_o."""
    case, ridge = folded("llama"), 1e-2
    site = case.sites[1]
    merged, refits = case.twin(site), case.refit(ridge, value_steps=0)
    key = f"{site.weights['o']}.weight"
    still = missing(case, site, refits)
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
    step = case.twin(site, refits)[key].double() - merged[key]
    assert_tight_through_float32_norms(damping * step, still.T @ a)


def site_calls(
    directory: Path,
    site: Site,
    sample: Mapping[str, Tensor],
    order: Sequence[int] | None = None,
    fixes_attention: bool = True,
) -> RecordedSite:
    model = stock_model(directory)
    recorded = [
        RecordedCall(call, answer, mask_of(site, sample, answer, queries=True))
        for _, call, answer in recorded_calls(model, [site], sample)
    ]
    return RecordedSite(
        model.get_submodule(site.module),
        site,
        recorded,
        order or range(site.num_heads),
        fixes_attention=fixes_attention,
    )


@torch.no_grad()
def lacking(site_calls: RecordedSite, heads: Heads) -> float:
    replay = site_calls.run(heads, 0)
    return energy(replay.target - replay.output) / energy(replay.target)


@pytest.mark.parametrize("name", KINDS)
def test_spoilt_values_are_found_again(name: str) -> None:
    """Their loss has its only minimum where the answers are the original's, and the gradients are those of every kind of family."""
    directory, sample = tiny_checkpoint(name), tiny_sample(name, 12)
    site, heads = tiny_sites(directory)[-1]
    tried = site_calls(directory, site, sample)
    noise = torch.randn(heads.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise[..., -1] *= bool({"v", "qkv"} & set(site.biases))
    spoilt = dataclasses.replace(heads, v=heads.v + noise * heads.v.std())
    assert lacking(tried, spoilt) > 0.1
    found = refit_values(tried, spoilt, 1e-12, 20)
    assert lacking(tried, found) < 0.1 * lacking(tried, spoilt)
    for field in ("q", "k", "o"):
        assert_bitwise(getattr(found, field), getattr(heads, field))


COMPUTED_ANEW = ("llama", "t5", "whisper", "bert", "phi3")


@pytest.mark.parametrize(("name", "kept"), [*((name, 2**30) for name in KINDS), *((name, 0) for name in COMPUTED_ANEW)])
def test_attention_computed_once_is_the_stock_one(name: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and their gradients in V, on the first and the second run of a call, with more queries than one part holds."""
    monkeypatch.setattr(fixed_attention, "KEPT_BYTES", kept)
    monkeypatch.setattr(fixed_attention, "_ROWS", 5)
    directory, sample = tiny_checkpoint(name), tiny_sample(name, 3)
    site, heads = tiny_sites(directory)[-1]
    stock, fixed = (site_calls(directory, site, sample, fixes_attention=fixes) for fixes in (False, True))
    found = []
    for calls in (stock, fixed, fixed):
        leaf = heads.v.clone().requires_grad_()
        output = calls.run(dataclasses.replace(heads, v=leaf), 0).output
        found.append((output.detach(), *torch.autograd.grad(output.square().sum(), leaf)))
    for once in found[1:]:
        for mine, theirs in zip(once, found[0], strict=True):
            assert_tight_through_float32_norms(mine, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "bart", "whisper", "vit", "mistral"])
def test_attention_is_computed_once_where_it_is_sdpa(name: str) -> None:
    """The queries are then no longer asked for: a gradient in them would be zero."""
    directory, sample = tiny_checkpoint(name), tiny_sample(name, 3)
    site, heads = tiny_sites(directory)[-1]
    calls = site_calls(directory, site, sample)
    first = calls.run(heads, 0).output
    assert_bitwise(calls.run(dataclasses.replace(heads, q=heads.q * 2), 0).output, first)
    assert_differs(site_calls(directory, site, sample).run(dataclasses.replace(heads, q=heads.q * 2), 0).output, first)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_each_step_for_the_values_lowers_the_error(steps: int) -> None:
    case = folded("llama")
    for site in case.sites:
        tried, heads = site_calls(case.directory, site, SAMPLE), case.merged(site)
        before, after = (lacking(tried, refit_values(tried, heads, SMALL, n)) for n in (steps - 1, steps))
        assert after < before


def test_values_that_carry_nothing_stay() -> None:
    """No curvature, no step: nothing is divided by zero."""
    case = folded("llama")
    site = case.sites[0]
    heads = case.merged(site)
    blind = dataclasses.replace(heads, o=torch.zeros_like(heads.o))
    assert_bitwise(refit_values(site_calls(case.directory, site, SAMPLE), blind, 0.0, 3).v, heads.v)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in {"bloom", "mpt", "falcon-rw"}])
def test_a_site_in_another_order_is_tried_as_the_same_function(name: str) -> None:
    """T5's layers get their position bias handed over from the first, in the original's order."""
    directory, sample = tiny_checkpoint(name), tiny_sample(name, 4)
    for site, heads in tiny_sites(directory):
        if site.num_kv_heads == site.num_heads and site.query_order != "fixed":
            order = [*range(1, site.num_heads), 0]
            moved = heads.reorder(tuple(order))
            gain = moved.k_gain if moved.k_gain is None or moved.k_gain.ndim == 1 else moved.k_gain[order]
            moved = dataclasses.replace(moved, k=moved.k[order], v=moved.v[order], k_gain=gain, groups=heads.groups)
            assert lacking(site_calls(directory, site, sample, order), moved) < 1e-9


@pytest.mark.parametrize("name", ["t5", "bert", "clip", "llama"])
def test_portions_change_nothing_and_progress_ends_where_it_should(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, sample = tiny_checkpoint(name), tiny_sample(name, 12)
    sites = [site for site, _ in tiny_sites(directory)]
    read = load_file(directory / "model.safetensors").__getitem__
    model = stock_model(directory)
    plan = make_plan(
        sites, read, "1/2", source="tiny", group="random", merge="absorb", stats=collect(model, sites, sample)
    )
    stats, found, heard = collect(model, sites, sample), [], []
    for size in (2**31, 1):
        monkeypatch.setattr("headfold.refine.fitting.PORTION_BYTES", size)
        heard.append(0)

        def count(tokens: int) -> None:
            heard[-1] += tokens

        found.append(
            refit(
                model,
                sites,
                lambda site: site_heads(site, plan, read, stats),
                sample,
                order=lambda site: query_order(site, plan),
                progress=count,
            )
        )
    for site in sites:
        for field, tensor in found[0][site.name].to_tensors().items():
            assert_bitwise(tensor, getattr(found[1][site.name], field))
        tried = site_calls(directory, site, sample, query_order(site, plan))
        merged = site_heads(site, plan, read, stats)
        refitted = found[0][site.name].to("cpu", torch.float64).onto(merged)
        assert lacking(tried, refitted) < lacking(tried, merged)
    assert heard == [tokens_per_block(sample) * len(sites)] * 2
