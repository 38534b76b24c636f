"""Laws of the merges, over every page in headfold/merge and every kind of attention site."""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight
from hypothesis import given, settings
from random_sites import FREEDOMS, RandomSite, cases, planted, random_site, realised_error, rotated_copies
from reference_attention import attention_output, project
from torch import Tensor

from headfold import merge as merges
from headfold.core import plugins
from headfold.core.equivalents import repeated_random_equivalent
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.heads import Heads
from headfold.core.methods import MergeMethod, Undoes
from headfold.core.moments import site_moments
from headfold.core.predict import SiteError, site_energy
from headfold.core.stats import SiteStats

NAMES = plugins.names(merges)
EVERY_MERGE = pytest.mark.parametrize("name", NAMES)
EVERY_FREEDOM = pytest.mark.parametrize("freedom", sorted(FREEDOMS))
PROCRUSTES_BOTH_WAYS = ("procrustes", "procrustes:norm=true")
SOME = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def merged(site: RandomSite, text: str, groups: Groups, seed: int = 0) -> Heads:
    return merges.parse_merge(text)(site.heads, groups, site.stats, seed=seed)


def output(site: RandomSite, heads: Heads | None = None) -> Tensor:
    """What the block answers to tokens that calibration did not see."""
    unseen = site.x[0].roll(1, 1) + site.x[1].flip(0)
    return attention_output(heads or site.heads, unseen)


def record_of(name: str) -> MergeMethod:
    return plugins.load(merges, name, MergeMethod)


def merges_that_undo(*declared: Undoes) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in NAMES if record_of(name).undoes in declared])


@EVERY_MERGE
@EVERY_FREEDOM
def test_no_sharing_keeps_the_function(name: str, freedom: str) -> None:
    site = random_site(freedom, 3, 2)
    assert_tight(output(site, merged(site, name, Groups.contiguous(3, 3))), output(site))


@merges_that_undo("copies", "rotations", "key_freedom")
@EVERY_FREEDOM
def test_identical_heads_keep_the_function(name: str, freedom: str) -> None:
    few = random_site(freedom, 2, 6)
    site = replace(few, heads=few.heads.expand(6))
    assert_tight(output(site, merged(site, name, Groups.contiguous(6, 2))), output(few))


@merges_that_undo("rotations", "key_freedom")
@EVERY_FREEDOM
@pytest.mark.parametrize("bias", [True, False])
def test_rotated_heads_keep_the_function(name: str, freedom: str, bias: bool) -> None:
    few = random_site(freedom, 2, 6, bias=bias)
    site = replace(few, heads=rotated_copies(few.heads, 3, seed=1))
    assert_tight(output(site), output(few))
    assert_tight(output(site, merged(site, name, Groups.contiguous(6, 2))), output(few))


@merges_that_undo("key_freedom")
@EVERY_FREEDOM
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("queries", [3, 6])
def test_transformed_copies_keep_the_function(name: str, freedom: str, bias: bool, queries: int) -> None:
    few = random_site(freedom, 2, queries, bias=bias)
    site = replace(few, heads=repeated_random_equivalent(few.heads, 3, seed=2))
    assert planted(site.heads).sizes == (3, 3)
    assert_tight(output(site), output(few))
    assert_tight(output(site, merged(site, name, planted(site.heads))), output(few))


@merges_that_undo("nothing", "copies", "rotations")
@pytest.mark.parametrize("freedom", sorted(set(FREEDOMS) - {"normed", "normed pairs", "normed together"}))
def test_merges_do_not_undo_more_than_declared(name: str, freedom: str) -> None:
    few = random_site(freedom, 2, 3)
    site = replace(few, heads=repeated_random_equivalent(few.heads, 3, seed=2))
    assert_differs(output(site, merged(site, name, planted(site.heads))), output(few))


@EVERY_FREEDOM
def test_mean_does_not_undo_rotations(freedom: str) -> None:
    few = random_site(freedom, 2, 3)
    site = replace(few, heads=rotated_copies(few.heads, 3, seed=1))
    assert_differs(output(site, merged(site, "mean", Groups.contiguous(6, 2))), output(few))


def not_above(ours: float, other: float, scale: float) -> None:
    """At most `other`, up to reassociation in float64 of numbers that add up to `scale`."""
    assert_tight(torch.tensor([scale + max(ours - other, 0.0)]), torch.tensor([scale]))


@SOME
@given(cases())
def test_absorb_is_best_on_its_own_objective(case: tuple[RandomSite, Groups]) -> None:
    site, groups = case
    errors: dict[str, SiteError] = {
        text: realised_error(site.heads, merged(site, text, groups), site.x)
        for text in ("absorb", "mean", "first", *PROCRUSTES_BOTH_WAYS)
    }
    ours, energy = errors.pop("absorb"), site_energy(site_moments(site.heads, site.stats))
    for theirs in errors.values():
        not_above(ours.value, theirs.value, energy.value)
        not_above(ours.key, theirs.key, energy.key)


def test_the_objective_tells_merges_apart() -> None:
    site, groups = random_site(), Groups.contiguous(4, 2)
    errors = [realised_error(site.heads, merged(site, text, groups), site.x) for text in ("absorb", "mean")]
    assert errors[0].key < 0.9 * errors[1].key
    assert errors[0].value < 0.9 * errors[1].value


def aligned_distance(
    site: RandomSite, after: Heads, groups: Groups, turn: Callable[[str, int], Tensor]
) -> dict[str, float]:
    """Σ over heads of E‖R x − shared‖², for K and V apart, in units that no reader weighs."""
    tokens = site.x.flatten(0, 1)
    return {
        role: sum(
            float((project(before, tokens) @ turn(role, head).T - project(shared[group], tokens)).square().sum(1).mean())
            for head, (before, group) in enumerate(zip(getattr(site.heads, role), groups.group_of_head, strict=True))
        )
        for role, shared in (("k", after.k), ("v", after.v))
    }  # fmt: skip


@SOME
@given(cases())
def test_procrustes_is_nearer_than_the_mean_on_the_unweighted_distance(case: tuple[RandomSite, Groups]) -> None:
    site, groups = case
    first_query = {kv: query for query, kv in reversed(list(enumerate(site.heads.groups.group_of_head)))}
    aligned, plain = (merged(site, name, groups) for name in ("procrustes", "mean"))

    def turn(role: str, head: int) -> Tensor:
        reader, query = {"k": "q", "v": "o"}[role], first_query[head]
        before, after = getattr(site.heads, reader)[query], getattr(aligned, reader)[query]
        return (torch.linalg.pinv(before.T) @ after.T).T

    still = {"k": torch.eye(site.heads.k.shape[1]).double(), "v": torch.eye(site.heads.v.shape[1]).double()}
    ours = aligned_distance(site, aligned, groups, turn)
    theirs = aligned_distance(site, plain, groups, lambda role, head: still[role])
    energy = {
        role: sum(float(project(rows, site.x).square().sum()) for rows in getattr(site.heads, role)) for role in "kv"
    }
    for role in "v" if site.heads.key_freedom.normed else "kv":
        not_above(ours[role], theirs[role], energy[role])


@pytest.mark.parametrize("freedom", sorted(FREEDOMS))
def test_procrustes_goes_on_until_nothing_gains(freedom: str) -> None:
    """The better the members agree, the longer their mean."""
    site = random_site(freedom, 6, seed=1)
    lengths = [
        float(project(merged(site, f"procrustes:iterations={n}", Groups.contiguous(6, 1)).v[0], site.x).square().sum())
        for n in (0, 1, 100)
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[2]
    assert float(project(merged(site, "procrustes", Groups.contiguous(6, 1)).v[0], site.x).square().sum()) == lengths[2]


@EVERY_MERGE
@SOME
@given(cases())
def test_shapes_map_and_dtype_are_as_agreed(name: str, case: tuple[RandomSite, Groups]) -> None:
    site, groups = case
    heads = site.heads.to(torch.float32)
    kept = {f.name: getattr(heads, f.name) for f in fields(heads)}
    copies = {key: t.clone() for key, t in kept.items() if isinstance(t, Tensor)}
    new = merges.parse_merge(name)(heads, groups, site.stats, seed=1)
    for key, tensor in copies.items():
        assert_bitwise(kept[key], tensor)  # the source is left as it was
        found = getattr(new, key)
        assert found.dtype in (torch.float32, torch.float64)
        by_group = key in ("k", "v") or (key == "k_gain" and tensor.ndim == 2)
        expected = (groups.num_kv_heads, *tensor.shape[1:]) if by_group else tensor.shape
        assert found.shape == expected
    assert new.groups == heads.groups.compose(groups)
    assert new.key_freedom == heads.key_freedom
    again = merges.parse_merge(name)(heads, groups, site.stats, seed=1)
    for key in copies:
        assert_bitwise(getattr(new, key), getattr(again, key))


@EVERY_MERGE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_too(name: str, dtype: torch.dtype) -> None:
    """Merges get heads in the checkpoint's dtype: near the merge of the same numbers in float64."""
    site = random_site(next(iter(FREEDOMS)), 4, 2)
    groups, rounded = Groups.contiguous(4, 2), site.heads.to(dtype)
    method = merges.parse_merge(name)
    found = method(rounded, groups, site.stats, seed=1).to(torch.float64)
    if name == "random":  # drawn in the dtype that it is given
        return
    expected = method(rounded.to(torch.float64), groups, site.stats, seed=1)
    for role in ("k", "v"):
        scale = getattr(expected, role).abs().max()
        assert (getattr(found, role) - getattr(expected, role)).abs().max() <= 2 * torch.finfo(dtype).eps * scale


@EVERY_MERGE
@EVERY_FREEDOM
def test_queries_and_outputs_change_as_declared(name: str, freedom: str) -> None:
    site = random_site(freedom, 4, 2)
    new = merged(site, name, Groups.contiguous(4, 2))
    for role in ("q", "o"):
        before, after = getattr(site.heads, role), getattr(new, role)
        (assert_differs if record_of(name).transforms_queries else assert_bitwise)(after, before)


@EVERY_MERGE
def test_only_declared_statistics_are_read(name: str) -> None:
    site, groups = random_site("halves"), Groups.contiguous(4, 2)
    declared = {key: t for key, t in site.stats.tensors.items() if key in record_of(name).statistics}
    new, all_known = (
        merges.parse_merge(name)(site.heads, groups, stats)
        for stats in (SiteStats(declared, site.stats.count), site.stats)
    )
    for role in ("q", "k", "v", "o"):
        assert_bitwise(getattr(new, role), getattr(all_known, role))


@EVERY_MERGE
def test_head_dim_multiples_are_made_as_declared(name: str) -> None:
    site = random_site("halves")
    takes = "head_dim_multiple" in inspect.signature(record_of(name).merge).parameters
    assert takes == record_of(name).head_dim_multiples
    if takes:
        enlarged = merges.parse_merge(name)(site.heads, Groups.contiguous(4, 2), site.stats, head_dim_multiple=2)
        assert enlarged.head_dim == 2 * site.heads.head_dim


@EVERY_MERGE
@EVERY_FREEDOM
def test_no_bias_grows_where_the_source_has_none(name: str, freedom: str) -> None:
    site = random_site(freedom, 4, 2, bias=False)
    new = merged(site, name, Groups.contiguous(4, 2))
    for role in ("q", "k", "v"):
        assert not getattr(new, role)[..., -1].any()
    assert new.o_bias is None


@merges_that_undo("copies", "rotations", "key_freedom")
def test_a_merge_follows_the_names_of_the_heads(name: str) -> None:
    """K/V heads in another order, with the groups renamed accordingly: the same function."""
    site, groups = random_site("partial halves", 6), Groups((0, 0, 1, 1, 2, 2))
    order = [4, 0, 2, 1, 5, 3]  # mixes the groups, not their first heads: `first` may well depend on those
    moved = {role: getattr(site.heads, role)[order] for role in ("q", "k", "v", "o")}
    renamed = Groups.of([groups.group_of_head[head] for head in order])
    new = merged(replace(site, heads=replace(site.heads, **moved)), name, renamed)
    assert_tight(output(site, new), output(site, merged(site, name, groups)))


@EVERY_MERGE
def test_statistics_are_asked_for_where_they_are_needed(name: str) -> None:
    record = record_of(name)
    call = partial(record.merge, random_site().heads, Groups.contiguous(4, 2))
    assert [p.name for p in inspect.signature(record.merge).parameters.values()][:3] == ["heads", "groups", "stats"]
    if not record.statistics:
        call()
        return
    with pytest.raises(UserError, match=f"{name} needs calibration statistics"):
        call()
