"""WGQA's laws: a weighted sum starts at the mean fold, moves as the formulas say, and folds away without a trace."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise, assert_differs, assert_tight
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration
from weighted_folds import GROUPS, answer, attach, attached, backward, fold_of, linears, load

import headfold
from headfold.conversion.source import Source, open_source
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.plan import Plan, SitePlan
from headfold.families import family_of
from headfold.families.folded import folded_config
from headfold.families.spec import sites
from headfold.runtime.modeling_headfold import grouped_class
from headfold.train import wgqa

KINDS = get_args(wgqa.Kind)
FORMULA = ["llama", "llama-bias-gqa", "t5", "gpt2", "opt"]


@torch.no_grad()
def shake(model: PreTrainedModel) -> None:
    """As if trained: all that trains moves."""
    for parameters in wgqa.trainable(model).values():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GROUPS)
def test_it_starts_at_the_mean_fold(name: str, kind: str) -> None:
    model, fold = attached(name, f"wgqa:kind={kind}"), load(fold_of(name)[1])
    for (*_, ours, heads), (*_, mean, _) in zip(linears(model, name), linears(fold, name), strict=True):
        assert_bitwise(ours.weight, mean.weight)
        rows = [heads[list(members), :, :-1].mean(0) for members in Groups(GROUPS[name]).members]
        assert_tight(ours.weight, torch.cat(rows))
    assert_tight(answer(model, name), answer(fold, name))
    assert_differs(answer(attached(name, f"wgqa:kind={kind},init=random"), name), answer(fold, name))


@pytest.mark.parametrize(("init", "frozen"), [("mean", False), ("random", True)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GROUPS)
def test_every_coefficient_is_trained_and_frozen_bases_are_not(name: str, kind: str, init: str, frozen: bool) -> None:
    model = attached(name, f"wgqa:kind={kind},init={init},frozen={str(frozen).lower()}")
    backward(model, name)
    found, members = wgqa.trainable(model), wgqa.attached(model)
    assert [id(p) for p in found["coefficients"]] == [id(heads.coefficients) for heads in members]
    assert len(members) == 2 * len(fold_of(name)[0].sites)
    for _, _, linear, heads in linears(model, name):
        bases = [linear.parametrizations[tensor].original for tensor in linear.parametrizations]
        assert [base.shape.numel() for base in bases] == [heads[..., :-1].numel(), heads[..., -1].numel()][: len(bases)]
        gradient = linear.parametrizations.weight[0].coefficients.grad
        columns = heads.shape[-1] - 1  # softmax does not see a bias of K without a rotation
        assert gradient[..., :columns].count_nonzero() == gradient[..., :columns].numel() > 0
        assert all((base.grad is None) == frozen and base.requires_grad != frozen for base in bases)
    assert bool(found["weights"]) != frozen
    assert frozen == all(p.grad is None for p in model.parameters() if id(p) not in set(map(id, found["coefficients"])))


@pytest.mark.parametrize(("kind", "frozen"), [("scalar", True), ("column", False), ("row", True), ("row", False)])
@pytest.mark.parametrize("name", GROUPS)
def test_it_folds_away(name: str, kind: str, frozen: bool, tmp_path: Path) -> None:
    _, target = fold_of(name)
    model = attached(name, f"wgqa:kind={kind},init=random,frozen={str(frozen).lower()}")
    backward(model, name)
    shake(model)
    before, fold = answer(model, name), load(target)
    wgqa.fold_away(model)
    assert_bitwise(answer(model, name), before)
    assert_differs(before, answer(fold, name))
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in fold.state_dict().items()}
    assert [type(m) for m in model.modules()] == [type(m) for m in fold.modules()]
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "headfold_trained")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(target / "model.safetensors").keys()
    assert_bitwise(answer(load(tmp_path), name), before)
    backward(model, name)  # and can be trained on


def weigh(kind: str, product: Tensor, linear: nn.Linear) -> Tensor:
    """⟨dL/dW, W_i⟩ summed over what one coefficient of that kind multiplies."""
    if linear.bias is None:
        product = product[..., :-1]
    return product.sum({"scalar": (1, 2), "column": (2,), "row": (1,)}[kind], keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMULA)
def test_a_step_is_that_of_the_formula(name: str, kind: str) -> None:
    """The gradient at the mean fold, derived by hand, and plain gradient descent along it."""
    fold, model = load(fold_of(name)[1]), attached(name, f"wgqa:kind={kind}")
    backward(fold, name)
    backward(model, name)
    before = [heads.coefficients.detach().clone() for heads in wgqa.attached(model)]
    torch.optim.SGD(wgqa.trainable(model)["coefficients"], lr=0.25).step()
    members = {(heads.site, heads.role): heads.coefficients for heads in wgqa.attached(model)}
    for (site, role, linear, heads), old in zip(linears(fold, name), before, strict=True):
        gradients = [
            linear.weight.grad,
            (linear.bias.grad if linear.bias is not None else heads.new_zeros(len(linear.weight)))[:, None],
        ]
        of_group = torch.cat(gradients, 1).unflatten(0, (-1, heads.shape[1]))
        expected = weigh(kind, of_group[list(GROUPS[name])] * heads, linear)
        assert_tight(members[site.name, role], old - 0.25 * expected)


PAPER = {
    "scalar": lambda w, base: w * base,
    "column": lambda c, base: c.diag() @ base,
    "row": lambda r, base: base @ r.diag(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMULA)
def test_weights_are_the_papers_sums(name: str, kind: str) -> None:
    """Head by head: numbers, diagonal matrices on the left, and on the right."""
    model = attached(name, f"wgqa:kind={kind},init=random", seed=3)
    by_site = wgqa.coefficients(model)
    for site, role, linear, heads in linears(model, name):
        own, columns = by_site[site.name][role], heads.shape[-1] - (linear.bias is None)
        assert own.shape == (len(heads), *{"scalar": (), "column": heads.shape[1:2], "row": (columns,)}[kind])
        rows = torch.zeros(max(GROUPS[name]) + 1, heads.shape[1], columns, dtype=torch.float64)
        for head, group in enumerate(GROUPS[name]):
            rows[group] += PAPER[kind](own[head], heads[head][:, :columns])
        assert_tight(linear.weight, rows[..., : linear.weight.shape[1]].flatten(0, 1))
        if linear.bias is not None:
            assert_tight(linear.bias, rows[..., -1].flatten())


T5_BASE = T5Config(d_model=768, d_kv=64, num_heads=12, d_ff=3072, num_layers=12)


@pytest.mark.parametrize(("kind", "count"), [("scalar", 576), ("column", 36_864), ("row", 442_368)])
def test_t5_base_has_as_many_coefficients_as_the_paper_says(kind: str, count: int) -> None:
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in T5ForConditionalGeneration(T5_BASE).state_dict().items()}
    config = {**T5_BASE.to_dict(), "architectures": ["T5ForConditionalGeneration"]}
    tensors = {name: torch.empty(1).expand(shape) for name, shape in shapes.items()}
    family = family_of(config)
    decoder = [site for site in sites(family, config, tensors) if not site.optional]
    plan = Plan({s.name: SitePlan(Groups.contiguous(12, 6), "mean", 64) for s in decoder}, "contiguous", "")
    folded = folded_config(family, config, decoder, plan.num_kv_heads)
    with torch.device("meta"):
        model = grouped_class("T5ForConditionalGeneration")(T5Config(**folded))
    zeros = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    wgqa.attach(model, decoder, plan, zeros.__getitem__, f"wgqa:kind={kind}")
    assert sum(p.numel() for p in wgqa.trainable(model)["coefficients"]) == count


def drawn(seed: int) -> Tensor:
    by_site = wgqa.coefficients(attached("t5", "wgqa:kind=row,init=random", seed))
    return torch.cat([values.flatten() for roles in by_site.values() for values in roles.values()])


def test_random_coefficients_are_seeded_normals() -> None:
    first, again, other = map(drawn, (5, 5, 6))
    assert_bitwise(first, again)
    assert_differs(first, other)
    assert len(first.unique()) == len(first)  # no two sites draw the same
    # Four standard errors of the mean and of the deviation.
    assert abs(first.mean()) < 4 * len(first) ** -0.5 and abs(first.std() - 1) < 4 * (2 * len(first)) ** -0.5


def test_what_was_not_trained_before_is_not_afterwards() -> None:
    fold = fold_of("t5")
    model = load(fold[1])
    model.shared.requires_grad_(False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attach(model, fold, "wgqa:frozen=true")
    wgqa.fold_away(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert 0 < len(trained) < len(list(model.parameters()))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("wgqa:kind=diagonal", ["kind='diagonal'", "expected scalar or row or column"]),
        ("wgqa:init=half", ["init='half'", "expected mean or random"]),
        ("wgqa:frozen=perhaps", ["frozen='perhaps'", "expected true or false"]),
        ("wgqa:rank=2", ["no option 'rank=2'", "kind=scalar"]),
        ("lora", ["unknown parametrization 'lora'", "expected wgqa"]),
    ],
)  # fmt: skip
def test_specs_that_say_nothing_are_refused(spec: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        wgqa.parse(spec)
    one_line(error, *words)


def refused(model: PreTrainedModel, source: Source, plan: Plan, *words: str) -> None:
    names = set(model.state_dict())
    with pytest.raises(UserError) as error:
        wgqa.attach(model, source.sites, plan, source.checkpoint.read)
    one_line(error, "wgqa", *words)
    assert set(model.state_dict()) == names  # nothing was begun


def test_models_that_are_not_that_fold_are_refused(tmp_path: Path) -> None:
    fold = source, target = fold_of("llama")
    plan, model = Plan.load(target / "plan.json"), load(target)
    with pytest.raises(UserError, match="expected a model with WGQA attached, got one without"):
        wgqa.fold_away(model)
    elsewhere = {name: replace(row, groups=Groups.contiguous(8, 2)) for name, row in plan.sites.items()}
    refused(
        model,
        source,
        replace(plan, sites=elsewhere),
        "layers.0.self",
        "q_proj.weight as the plan makes it",
        "other numbers",
    )
    refused(
        model, source, replace(plan, quantised_cache=True), "the plan rotates them", "fold without --quantised-cache"
    )
    fewer = {name: replace(row, groups=Groups.contiguous(8, 4)) for name, row in plan.sites.items()}
    refused(model, source, replace(plan, sites=fewer), "q_proj.weight as the plan makes it")
    refused(model, source, replace(plan, sites={}), "some of these sites fewer K/V heads, got none")
    wide = {name: replace(row, head_dim=16) for name, row in plan.sites.items()}
    refused(model, source, replace(plan, sites=wide), "original's head_dim 8, the plan has 16", "--head-dim-multiple 1")
    turned = {name: replace(row, merge="procrustes:iterations=9") for name, row in plan.sites.items()}
    refused(
        model,
        source,
        replace(plan, sites=turned),
        "does not transform queries, the plan has procrustes:iterations=9",
        "--merge mean",
    )
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] += 1
    refused(model, source, plan, "layers.1.self", "o_proj.weight", "attach before training")
    model = load(target)
    attach(model, fold, "wgqa")
    refused(model, source, plan, "got one that has it attached", "fold it away first")


@pytest.mark.parametrize(
    ("name", "words"),
    [("phi3", ["linears of their own for k and v"]), ("gpt_neox", ["no such parameter", "--layout headfold"])],
)
def test_other_layouts_are_refused(name: str, words: list[str], tmp_path: Path) -> None:
    source = tiny_checkpoint(name)
    headfold.fold(source, tmp_path / "fold", kv_heads=2, group="contiguous", merge="mean", refit=False, verify=False)
    refused(load(tmp_path / "fold"), open_source(source), Plan.load(tmp_path / "fold" / "plan.json"), *words)
