"""Heads under norms of queries and keys: what is nearly free there, and what a fold says of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grades import assert_bitwise, assert_tight
from random_sites import DIM, plane_dims, random_site
from reference_attention import project
from test_merges import merged, output
from tiny import tiny_checkpoint, tiny_sites
from torch import Generator, Tensor

import headfold
from headfold.core import norms
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.plan import Plan, SitePlan

NORMED = ("normed", "normed pairs", "normed together")
EVERY_NORM = pytest.mark.parametrize("freedom", NORMED)


@EVERY_NORM
def test_without_norms_queries_and_keys_have_the_lengths_that_norms_give_them(freedom: str) -> None:
    site = random_site(freedom, 3, 2)
    linear, tokens = norms.without_norms(site.heads, site.stats), site.x.flatten(0, 1)
    assert not linear.key_freedom.normed and linear.q_gain is linear.k_gain is None
    for rows, gain in ((linear.q, site.heads.q_gain), (linear.k, site.heads.k_gain)):
        before_gains = torch.stack([project(each, tokens) for each in rows]) / gain.expand(len(rows), DIM)[:, None]
        mean_square = before_gains.square().mean(() if freedom == "normed together" else (1, 2))
        assert_tight(mean_square, torch.ones_like(mean_square))
    unnormed = random_site("halves", 3, 2)
    assert norms.without_norms(unnormed.heads, unnormed.stats) is unnormed.heads


@EVERY_NORM
def test_heads_that_are_not_shared_come_back_as_they_were(freedom: str) -> None:
    site = random_site(freedom, 3, 2)
    back = norms.with_norms(norms.without_norms(site.heads, site.stats), site.heads, site.stats)
    for field in ("q", "k", "q_gain", "k_gain"):
        assert_bitwise(getattr(back, field), getattr(site.heads, field))
    assert back.key_freedom == site.heads.key_freedom


@EVERY_NORM
def test_rotated_planes_are_found_where_their_gains_are_equal(freedom: str) -> None:
    """A rotation of a plane leaves the root mean square as it is, which a sign per plane cannot undo."""
    few = random_site(freedom, 1, 4)
    planes = plane_dims(few.heads.key_freedom)
    gains = {name: _equal_in_planes(getattr(few.heads, name), planes) for name in ("q_gain", "k_gain")}
    one = replace(few, heads=replace(few.heads, **gains))
    generator, apart = Generator().manual_seed(0), one.heads.expand(4)
    turns = torch.stack([_rotation(planes, generator) for _ in range(4)])
    site = replace(one, heads=replace(apart, q=turns @ apart.q, k=turns @ apart.k))
    assert_tight(output(site), output(one))
    assert_tight(output(site, merged(site, "absorb", Groups.contiguous(4, 1))), output(one))


def _equal_in_planes(gain: Tensor, planes: list[tuple[int, int]]) -> Tensor:
    gain = gain.clone()
    for a, b in planes:
        gain[..., b] = gain[..., a]
    return gain


def _rotation(planes: list[tuple[int, int]], generator: Generator) -> Tensor:
    turn = torch.zeros(DIM, DIM, dtype=torch.float64)
    for a, b in planes:
        angle = 6.28 * torch.rand((), dtype=torch.float64, generator=generator)
        turn[a, a] = turn[b, b] = angle.cos()
        turn[a, b], turn[b, a] = -angle.sin(), angle.sin()
    return turn


def _form_error(rows: Tensor, source: Tensor, second: Tensor) -> Tensor:
    """E[(mean (w x)² − mean (v x)²)²] over normal x of that second moment."""
    difference = rows.mT @ rows / len(rows) - source.mT @ source / len(source)
    return 2 * (difference @ second @ difference @ second).trace() + (difference @ second).trace() ** 2


def test_scales_bring_the_mean_square_nearest_and_leave_what_is_right() -> None:
    site = random_site("normed together", 6, 1)
    second, source = site.stats.mean("second"), site.heads.k
    few, ties = source[:2].flatten(0, 1) * torch.linspace(0.5, 2, 2 * DIM)[:, None], torch.arange(2 * DIM)
    scales = norms._scales(*norms._forms(few, source, second), ties)
    best = _form_error(few * scales[:, None], source.flatten(0, 1), second)
    assert best < 0.9 * _form_error(few, source.flatten(0, 1), second)
    for factor in (0.97, 1.03):
        assert best <= _form_error(few * scales[:, None] * factor, source.flatten(0, 1), second)
    whole = source.flatten(0, 1)
    right = norms._scales(*norms._forms(whole, source, second), torch.arange(len(whole)))
    assert_tight(right, torch.ones_like(right))


@EVERY_NORM
def test_a_merge_under_norms_loses_less_than_the_mean_and_signs(freedom: str) -> None:
    site = random_site(freedom, 4, 2, bias=False, seed=1)
    lost = {
        text: float((output(site, merged(site, text, Groups.contiguous(4, 2))) - output(site)).square().sum())
        for text in ("absorb", "mean", "procrustes:norm=true")
    }
    assert lost["absorb"] < min(lost["mean"], lost["procrustes:norm=true"])


def test_a_norm_of_all_heads_needs_groups_of_one_size() -> None:
    site, heads = tiny_sites(tiny_checkpoint("olmo2"))[0]
    uneven = Groups((0, 0, 0, 0, 0, 1, 1, 1))
    plan = Plan({site.name: SitePlan(uneven, "mean", site.head_dim)}, "contiguous", "")
    with pytest.raises(UserError, match=r"layers\.0\.self: one norm spans all its K heads, .*make groups of one size"):
        plan.check_source("", [site])
    assert heads.k_gain is not None and heads.k_gain.shape == (8, site.head_dim)


@pytest.mark.parametrize("counts", ["4", "by layer"])
def test_a_fold_says_that_it_is_approximate(counts: str, tmp_path: Path) -> None:
    """And runs with as many gains as it has K heads, where layers differ too."""
    source = tiny_checkpoint("olmo2")
    plan = headfold.plan(source, kv_heads=4, group="contiguous", merge="mean", out=tmp_path / "plan.json")
    if counts == "by layer":
        first = next(iter(plan.sites))
        whole = replace(plan.sites[first], groups=Groups.contiguous(8, 2))
        plan = replace(plan, sites={**plan.sites, first: whole})
    found = headfold.fold(source, tmp_path / "fold", plan=plan, refit=False)
    assert any("one norm spans all K heads" in note for note in found.notes)
    assert "one norm spans all K heads" in (tmp_path / "fold" / "README.md").read_text()
    assert "one norm spans all K heads" in headfold.inspect(source).key_freedom
