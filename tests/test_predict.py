"""Predicted errors are the real ones, on data with the independence that the prediction assumes."""

import itertools

import pytest
import torch
from grades import assert_tight
from hypothesis import given, settings
from random_sites import FREEDOMS, RandomSite, cases, plane_dims, random_site, realised_error
from reference_attention import project
from test_merges import not_above
from torch import Generator, Tensor

from headfold.core.groups import Groups
from headfold.core.heads import Heads
from headfold.core.moments import site_moments
from headfold.core.predict import SiteError, grouped_error, predicted_error, site_energy
from headfold.merge import absorb

STANDARD_ERRORS = 4
"""A seeded draw lies within; a prediction off by a tenth lies outside, which a test below makes sure of."""
PAIRS = 40_000

EVERY_FREEDOM = pytest.mark.parametrize("freedom", sorted(FREEDOMS))
SOME = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def exactly(found: SiteError, expected: SiteError, energy: SiteError) -> None:
    """Equal up to reassociation of the energies whose differences they are."""
    for part in ("key", "value"):
        base = getattr(energy, part)
        assert_tight(torch.tensor([base + getattr(found, part)]), torch.tensor([base + getattr(expected, part)]))


@SOME
@given(cases())
def test_the_prediction_is_the_mean_over_all_pairs_of_tokens(case: tuple[RandomSite, Groups]) -> None:
    """Queries and keys of the very tokens that made the statistics, every pair once: independent by construction."""
    site, groups = case
    moments = site_moments(site.heads, site.stats)
    realised = realised_error(site.heads, absorb.merge(site.heads, groups, site.stats), site.x)
    exactly(grouped_error(moments, groups), realised, site_energy(moments))


@EVERY_FREEDOM
def test_the_energy_is_what_dropping_k_or_v_costs(freedom: str) -> None:
    site = random_site(freedom, 3, 2)
    energy = site_energy(site_moments(site.heads, site.stats))
    tiny = 1e-9  # under q/k-norm a key of zero has no direction: keep one, and no weight
    dropped = Heads(
        **{name: getattr(site.heads, name) for name in ("o", "groups", "key_freedom", "o_bias", "q_gain", "k_gain")},
        q=site.heads.q * tiny, k=site.heads.k, v=site.heads.v * 0.0,
    )  # fmt: skip
    found = realised_error(site.heads, dropped, site.x)
    if not site.heads.key_freedom.normed:
        assert_tight(torch.tensor([found.key]), torch.tensor([energy.key * (1 - tiny) ** 2]))
    assert_tight(torch.tensor([found.value]), torch.tensor([energy.value]))


@EVERY_FREEDOM
def test_one_head_alone_and_equal_heads_lose_nothing(freedom: str) -> None:
    few = random_site(freedom, 2, 2)
    site = RandomSite(few.heads.expand(4), few.x, few.drawn)
    moments = site_moments(site.heads, site.stats)
    assert predicted_error(moments, [1]) == SiteError(0.0, 0.0)
    exactly(grouped_error(moments, Groups.contiguous(4, 2)), SiteError(0.0, 0.0), site_energy(moments))


@EVERY_FREEDOM
def test_the_prediction_counts_query_heads_not_their_grouping(freedom: str) -> None:
    """An already grouped source and its head-repeated twin have the same error in the same groups."""
    site, groups = random_site(freedom, 4, 2), Groups((0, 1, 1, 0))
    moments = site_moments(site.heads, site.stats)
    twin = site_moments(site.heads.per_query(), site.stats)
    spread = site.heads.groups.compose(groups)
    exactly(grouped_error(twin, spread), grouped_error(moments, groups), site_energy(moments))


@EVERY_FREEDOM
@pytest.mark.parametrize("num_shared", [1, 2])
def test_the_prediction_is_what_gaussian_tokens_show(freedom: str, num_shared: int) -> None:
    """Independent Gaussian queries and keys, every plane at a phase of its own drawn anew for every pair."""
    site, groups = random_site(freedom, 4, 2, seed=3), Groups.contiguous(4, num_shared)
    predicted = grouped_error(site_moments(site.heads, site.stats), groups)
    key, value = sampled_errors(site, absorb.merge(site.heads, groups, site.stats), torch.Generator().manual_seed(5))
    for samples, expected in ((key, predicted.key), (value, predicted.value)):
        spread = samples.std() / len(samples) ** 0.5
        assert abs(samples.mean() - expected) <= STANDARD_ERRORS * spread
        assert 0.1 * expected > 2 * STANDARD_ERRORS * spread, "too few samples to tell"


def sampled_errors(site: RandomSite, after: Heads, generator: Generator) -> tuple[Tensor, Tensor]:
    """Squared errors of logits and outputs, summed over query heads, one per drawn pair of tokens."""
    before, freedom = site.heads, site.heads.key_freedom
    of_query, of_key = (_gaussian(site, centred=False, generator=generator) for _ in range(2))
    centred = _gaussian(site, centred=True, generator=generator)
    phases = 2 * torch.pi * torch.rand(PAIRS, freedom.rotary_dim // 2, dtype=torch.float64, generator=generator)
    key = torch.zeros(PAIRS, dtype=torch.float64)
    for head in range(before.num_heads):
        old, new = (_logit(site, heads, head, of_query, of_key, centred, phases) for heads in (before, after))
        if freedom.normed:  # which leave every head one temperature
            new = new * (old * new).mean() / new.square().mean()
        key += (old - new).square()
    value = torch.zeros(PAIRS, dtype=torch.float64)
    mean = site.stats.mean("second")[-1, :-1]
    for head in range(before.num_heads):
        missing = torch.zeros(PAIRS, before.o.shape[2], dtype=torch.float64)
        for sign, heads in ((1, before), (-1, after)):
            v = heads.v[heads.groups.group_of_head[head]]
            missing += (
                sign * (project(v, of_key) - (project(v, mean) if before.o_bias is not None else 0)) @ heads.o[head]
            )
        value += missing.square().sum(1)
    return key, value


def _gaussian(site: RandomSite, *, centred: bool, generator: Generator) -> Tensor:
    """Tokens whose second moments are the site's statistics; with `centred` the scatter within sequences, mean zero."""
    second, mean = site.stats.mean("second")[:-1, :-1], site.stats.mean("second")[-1, :-1]
    spread = site.stats.mean("scatter") if centred else second - torch.outer(mean, mean)
    noise = torch.randn(PAIRS, len(spread), dtype=torch.float64, generator=generator)
    return noise @ torch.linalg.cholesky(spread).T + (0 if centred else mean)


def _logit(
    site: RandomSite, heads: Heads, head: int, of_query: Tensor, of_key: Tensor, centred: Tensor, phases: Tensor
) -> Tensor:
    """q·R(phases)k, the norms of q/k-norm held at what the source's statistics say; positionless dims see centred tokens."""
    freedom, shared = heads.key_freedom, heads.k[heads.groups.group_of_head[head]]
    rotary = freedom.rotary_dim
    q, k = project(heads.q[head], of_query), project(shared, of_key)
    if freedom.normed:
        second = site.stats.mean("second")
        group, together = heads.groups.group_of_head[head], freedom.norm_spans_heads
        q = (
            q
            / _length(heads.q if together else heads.q[[head]], second)
            * heads.q_gain.expand(*heads.q.shape[:2])[head]
        )
        k = (
            k
            / _length(heads.k if together else heads.k[[group]], second)
            * heads.k_gain.expand(*heads.k.shape[:2])[group]
        )
    logit = (q[:, rotary:] * (centred @ shared[rotary:, :-1].T)).sum(1)
    for (a, b), phase in zip(plane_dims(freedom), phases.T, strict=True):
        z = torch.complex(q[:, a], -q[:, b]) * torch.complex(k[:, a], k[:, b])
        logit = logit + (torch.polar(torch.ones_like(phase), phase) * z).real
    return logit


def _length(rows: Tensor, second: Tensor) -> Tensor:
    """Root mean square over tokens, heads and dims."""
    return torch.einsum("ham,mn,han->ha", rows, second, rows).mean().sqrt()


@SOME
@given(cases())
def test_sharing_more_never_loses_less(case: tuple[RandomSite, Groups]) -> None:
    """Errors are at least zero, at most the site's energy, and grow when groups are joined."""
    site, groups = case
    moments = site_moments(site.heads, site.stats)
    zero, some, all_in_one = (
        grouped_error(moments, g)
        for g in (Groups(tuple(range(groups.num_heads))), groups, Groups.contiguous(groups.num_heads, 1))
    )
    energy = site_energy(moments)
    for part in ("key", "value"):
        ladder = [getattr(error, part) for error in (zero, some, all_in_one, energy)]
        for less, more in itertools.pairwise(ladder):
            not_above(less, more, ladder[-1])
