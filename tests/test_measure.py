"""What calibration measures adds up, and is what a plain hook sees."""

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from tiny import TINY, stock_model, tiny_checkpoint, tiny_sites, tiny_tokens
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headfold import calibration
from headfold.calibration import collect
from headfold.core.errors import UserError
from headfold.core.stats import SiteStats
from headfold.measure import attended, second_moment

EVERY_TINY = pytest.mark.parametrize("name", sorted(TINY))
WINDOWS = tiny_tokens(7, 12)


def observed(x: Tensor) -> SiteStats:
    return SiteStats(second_moment.observe(x), x.shape[0] * x.shape[1])


def same(found: SiteStats, expected: SiteStats) -> None:
    """The moments, which every site has."""
    assert found.count == expected.count
    assert found.tensors.keys() - {"attended"} == expected.tensors.keys() - {"attended"} == {"second", "scatter"}
    for name, tensor in expected.tensors.items():
        assert_tight(found.tensors[name], tensor)


def brute_force(x: Tensor) -> SiteStats:
    """Σ [x, 1][x, 1]ᵀ and Σ (x − x̄)(x − x̄)ᵀ, one token at a time."""
    model = x.shape[2]
    second, scatter = torch.zeros(model + 1, model + 1).double(), torch.zeros(model, model).double()
    for sequence in x.double():
        for token in sequence:
            extended = torch.cat([token, torch.ones(1).double()])
            second += torch.outer(extended, extended)
            scatter += torch.outer(token - sequence.mean(0), token - sequence.mean(0))
    return SiteStats({"second": second, "scatter": scatter}, x.shape[0] * x.shape[1])


def tokens_with_means() -> Tensor:
    """Sequences whose means differ, so that the two statistics do."""
    return torch.randn(5, 9, 6).double() + 2 * torch.randn(5, 1, 6).double()


def test_second_moments_are_those_of_a_plain_loop() -> None:
    x = tokens_with_means()
    same(observed(x), brute_force(x))
    assert_differs(observed(x).tensors["second"][:-1, :-1], observed(x).tensors["scatter"])


def test_second_moments_add_over_sequences() -> None:
    x = tokens_with_means()
    same(observed(x[:2]) + observed(x[2:4]) + observed(x[4:]), observed(x))


def test_sums_are_wide_whatever_the_tokens_are() -> None:
    assert {t.dtype for t in second_moment.observe(torch.randn(2, 3, 4)).values()} == {torch.float64}


@EVERY_TINY
def test_a_pass_sums_what_a_plain_hook_on_k_sees(name: str) -> None:
    model, sites = stock_model(tiny_checkpoint(name)), [site for site, _ in tiny_sites(tiny_checkpoint(name))]
    inputs: dict[str, Tensor] = {}
    for site in sites:
        linear = model.get_submodule(f"{site.module}.{'qkv_proj' if 'qkv' in site.weights else 'k_proj'}")
        linear.register_forward_hook(lambda module, args, output, key=site.name: inputs.update({key: args[0]}))
    with torch.no_grad():
        model(WINDOWS)
    found = collect(stock_model(tiny_checkpoint(name)), sites, {"input_ids": WINDOWS})
    assert found.keys() == inputs.keys() and found
    for key, x in inputs.items():
        same(found[key], brute_force(x))


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 48])
def test_batches_sum_to_one_batch(tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sites = stock_model(tiny_checkpoint("llama")), [site for site, _ in tiny_sites(tiny_checkpoint("llama"))]
    whole = collect(model, sites, {"input_ids": WINDOWS})
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", tokens_per_batch)
    heard: list[int] = []
    parts = collect(model, sites, {"input_ids": WINDOWS}, heard.append)
    assert heard == [min(tokens_per_batch // 12 or 1, 7 - at) * 12 for at in range(0, 7, tokens_per_batch // 12 or 1)]
    for site in sites:
        same(parts[site.name], whole[site.name])
        assert_tight(parts[site.name].tensors["attended"], whole[site.name].tensors["attended"])


ROTATING = ("llama", "llama-bias-gqa", "glm", "phi", "mistral-window", "gemma")


@pytest.mark.parametrize("name", [name for name in ROTATING if name in TINY])
def test_how_far_back_attention_looks_is_what_stock_probabilities_say(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokens = tiny_checkpoint(name), WINDOWS.shape[1]
    monkeypatch.setattr(attended, "QUERIES", tokens)
    sites = [site for site, _ in tiny_sites(path)]
    found = collect(stock_model(path), sites, {"input_ids": WINDOWS})
    eager = stock_model(path)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(WINDOWS, output_attentions=True).attentions
    for site, of_layer in zip(sites, weights, strict=True):
        mass = torch.stack([of_layer.diagonal(-back, dim1=2, dim2=3).sum((0, 2)) for back in range(tokens)], 1)
        mass = mass.unflatten(0, (site.num_kv_heads, -1)).sum(1)
        # Stock attention takes its softmax in float32.
        assert_tight_through_float32_norms(found[site.name].tensors["attended"][:, :tokens], mass)
        assert not found[site.name].tensors["attended"][:, tokens:].any()


def test_calibrations_may_overlap() -> None:
    """Each sees its own model alone, whichever ends first, and what was there before is back when the last has ended."""
    before = dict(ALL_ATTENTION_FUNCTIONS)
    path = tiny_checkpoint("llama")
    sites = [site for site, _ in tiny_sites(path)]
    models, sums = [stock_model(path), stock_model(path)], ({}, {})
    first, second = (calibration._watching(model, sites, seen) for model, seen in zip(models, sums, strict=True))
    first.__enter__()
    second.__enter__()
    with torch.no_grad():
        models[0](WINDOWS)
        first.__exit__(None, None, None)
        models[1](WINDOWS)
    second.__exit__(None, None, None)
    for site in sites:
        assert_bitwise(*(seen[site.name].tensors["attended"] for seen in sums))
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_eager_attention_is_seen_too() -> None:
    path = tiny_checkpoint("llama")
    sites, eager = [site for site, _ in tiny_sites(path)], stock_model(path)
    eager.set_attn_implementation("eager")
    found, expected = (collect(model, sites, {"input_ids": WINDOWS}) for model in (eager, stock_model(path)))
    for site in sites:
        assert_tight_through_float32_norms(*(of[site.name].tensors["attended"] for of in (found, expected)))


def test_attention_is_looked_at_in_passing() -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    model, sites = stock_model(tiny_checkpoint("llama")), [site for site, _ in tiny_sites(tiny_checkpoint("llama"))]
    with pytest.raises(IndexError):
        collect(model, sites, {"input_ids": WINDOWS + 1000})
    collect(model, sites, {"input_ids": WINDOWS})
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_a_pass_leaves_no_hook_and_asks_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sites = stock_model(tiny_checkpoint("llama")), [site for site, _ in tiny_sites(tiny_checkpoint("llama"))]
    monkeypatch.setattr(model.lm_head, "forward", None)
    collect(model, sites, {"input_ids": WINDOWS})
    with pytest.raises(IndexError):
        collect(model, sites, {"input_ids": WINDOWS + 1000})
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("where", ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"])
def test_weights_that_are_not_numbers_are_refused_in_one_line(where: str) -> None:
    model, sites = stock_model(tiny_checkpoint("llama")), [site for site, _ in tiny_sites(tiny_checkpoint("llama"))]
    model.get_submodule(where).weight.data[3] = torch.nan
    with pytest.raises(UserError, match=r"^layers\.\d\.self: .*NaN") as refusal:
        collect(model, sites, {"input_ids": WINDOWS})
    assert "\n" not in str(refusal.value) and where.split(".")[2] in str(refusal.value)


def test_calibration_changes_nothing_in_the_model() -> None:
    model, sites = stock_model(tiny_checkpoint("llama")), [site for site, _ in tiny_sites(tiny_checkpoint("llama"))]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect(model, sites, {"input_ids": WINDOWS})
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, before[name])
