"""Laws of groupings and of the costs they search, over every page in headfold/group and headfold/group/costs."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from grades import assert_tight
from hypothesis import given, settings
from hypothesis import strategies as st
from random_sites import FREEDOMS, RandomSite, cases, planted, random_site, rotated_copies

from headfold import group as solvers
from headfold.core import plugins
from headfold.core.costs import SetCost, many, summed
from headfold.core.equivalents import random_equivalent, repeated_random_equivalent
from headfold.core.errors import UserError
from headfold.core.groups import Groups, check_group_count
from headfold.core.heads import Heads
from headfold.core.methods import CostMethod, GroupingMethod
from headfold.group import costs, swap

Cost = Callable[[tuple[int, ...]], float]

EVERY_SOLVER = pytest.mark.parametrize("name", plugins.names(solvers))
EVERY_COST = pytest.mark.parametrize("name", plugins.names(costs))
EVERY_FREEDOM = pytest.mark.parametrize("freedom", sorted(FREEDOMS))


def shuffled_copies(heads: Heads, num_copies: int, seed: int) -> Heads:
    """Each K/V head several times, as it is, in an order of no pattern."""
    own = heads.expand(heads.num_kv_heads * num_copies)
    order = random.Random(seed).sample(range(own.num_kv_heads), own.num_kv_heads)
    return replace(own, **{role: getattr(own, role)[order] for role in ("q", "k", "v", "o")})


COPIES_THAT_DIFFER_BY = {
    "copies": shuffled_copies,
    "rotations": rotated_copies,
    "key_freedom": repeated_random_equivalent,
}
FEW_TRIES: dict[str, dict[str, int]] = {
    "evolve": {"generations": 5},
    "qcqa": {"generations": 5},
    "asymgqa": {"tries": 50},
}
"""What holds of an answer after any number of tries holds after few, which take less time."""
SOME = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def record_of(name: str) -> GroupingMethod:
    return plugins.load(solvers, name, GroupingMethod)


def solve(name: str, cost: Cost, num_heads: int, num_kv_heads: int, seed: int = 0, **options: int) -> Groups:
    return record_of(name).group(cost, num_heads, num_kv_heads, seed=seed, **options)


def cost_of(name: str, site: RandomSite) -> Cost:
    return plugins.load(costs, name, CostMethod).cost(site.heads, site.stats)


def generic_cost(seed: int) -> Cost:
    """A number of its own for every set of heads, whatever the order in which they are named."""
    return lambda members: random.Random(f"{seed} {sorted(members)}").random() * len(members)


def pairwise_cost(seed: int) -> Cost:
    """Heads that like and dislike each other: a landscape with slopes, as real costs have."""
    pair = generic_cost(seed)
    return lambda members: sum(map(pair, itertools.combinations(members, 2)))


def total(cost: Cost, groups: Groups) -> float:
    return sum(cost(members) for members in groups.members)


def equal(found: float, expected: float, scale: float = 1.0) -> None:
    """Up to reassociation in float64 of numbers as large as `scale`."""
    assert_tight(torch.tensor([scale + found]), torch.tensor([scale + expected]))


@st.composite
def counts(draw: st.DrawFn, largest: int = 16) -> tuple[int, int]:
    """Heads, and groups that split them equally."""
    num_heads = draw(st.integers(1, largest))
    return num_heads, draw(st.sampled_from([n for n in range(1, num_heads + 1) if num_heads % n == 0]))


@EVERY_SOLVER
@SOME
@given(counts(), st.integers(0, 99))
def test_the_answer_is_a_balanced_partition_in_canonical_labels_and_repeatable(
    name: str, sizes: tuple[int, int], seed: int
) -> None:
    num_heads, num_kv_heads = sizes
    few = FEW_TRIES.get(name, {})
    groups = solve(name, generic_cost(seed), num_heads, num_kv_heads, seed, **few)
    assert (groups.num_heads, groups.num_kv_heads) == sizes
    if not record_of(name).unequal:
        assert set(groups.sizes) == {num_heads // num_kv_heads}
    assert groups == Groups.of(groups.group_of_head)
    assert groups == solve(name, generic_cost(seed), num_heads, num_kv_heads, seed, **few)


def test_a_seed_draws_a_partition_of_its_own() -> None:
    assert len({solve("random", generic_cost(0), 8, 2, seed) for seed in range(9)}) > 5


@SOME
@given(counts(largest=10), st.integers(0, 99))
def test_the_exact_search_finds_the_cheapest_partition(sizes: tuple[int, int], seed: int) -> None:
    cost = generic_cost(seed)
    num_heads, num_kv_heads = sizes
    cheapest = min(total(cost, groups) for groups in every_partition(num_heads, num_heads // num_kv_heads))
    equal(total(cost, solve("swap", cost, num_heads, num_kv_heads)), cheapest)


def every_partition(num_heads: int, size: int) -> list[Groups]:
    """By brute force: all ways to fill the group of the lowest head that is left."""

    def fill(free: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
        if not free:
            return [[]]
        chosen = [(free[0], *rest) for rest in itertools.combinations(free[1:], size - 1)]
        return [[heads, *others] for heads in chosen for others in fill(tuple(h for h in free if h not in heads))]

    return [Groups.from_members(members) for members in fill(tuple(range(num_heads)))]


@SOME
@given(counts(largest=10), st.randoms(use_true_random=False), st.integers(0, 99))
def test_the_exact_search_does_not_care_how_heads_are_named(
    sizes: tuple[int, int], shuffle: random.Random, seed: int
) -> None:
    num_heads, num_kv_heads = sizes
    cost = generic_cost(seed)
    old = list(range(num_heads))
    shuffle.shuffle(old)
    groups = solve("swap", cost, num_heads, num_kv_heads)
    renamed = solve("swap", lambda members: cost(tuple(old[head] for head in members)), num_heads, num_kv_heads)
    back = Groups.from_members([sorted(old[head] for head in members) for members in renamed.members])
    equal(total(cost, back), total(cost, groups))
    assert back == groups  # no two sets cost the same, so there is one cheapest partition


@pytest.mark.parametrize("seed", range(6))
def test_exact_beats_local_search_beats_chance(seed: int) -> None:
    cost, (num_heads, num_kv_heads) = pairwise_cost(seed), (12, 3)
    exact = total(cost, solve("swap", cost, num_heads, num_kv_heads, seed))
    local = total(cost, solve("swap", cost, num_heads, num_kv_heads, seed, exact_up_to=0))
    chance = [total(cost, solve("random", cost, num_heads, num_kv_heads, s)) for s in range(5)]
    contiguous = total(cost, solve("contiguous", cost, num_heads, num_kv_heads))
    assert exact <= local < min(*chance, contiguous)


@pytest.mark.parametrize("seed", range(3))
def test_local_search_ends_where_no_swap_gains(seed: int) -> None:
    cost = generic_cost(seed)
    groups = solve("swap", cost, 10, 2, seed, exact_up_to=0, restarts=1)
    for left, right in itertools.product(*groups.members):
        labels = list(groups.group_of_head)
        labels[left], labels[right] = labels[right], labels[left]
        assert total(cost, Groups.of(labels)) >= total(cost, groups) * (1 - 1e-11)


@EVERY_SOLVER
def test_a_solver_asks_only_for_sorted_sets(name: str) -> None:
    asked = []

    def cost(members: tuple[int, ...]) -> float:
        asked.append(members)
        return generic_cost(0)(members)

    few = FEW_TRIES.get(name, {})
    solve(name, cost, 8, 2, **few)
    solve(name, cost, 16, 4, **few)
    assert bool(asked) == (record_of(name).default_cost is not None)
    assert all(list(members) == sorted(set(members)) for members in asked)
    # Pairs replace costs that take long; beyond them only whole groups are evaluated.
    unequal = record_of(name).unequal
    assert unequal or {len(members) for members in asked} <= {2, 4}


UNEQUAL_SOLVERS = [
    name
    for name in plugins.names(solvers)
    if "unequal" in plugins.option_defaults(record_of(name).group) or record_of(name).unequal
]


def solve_unequal(name: str, cost: Cost, num_heads: int, num_kv_heads: int, **options: int) -> Groups:
    asked = {} if record_of(name).unequal else {"unequal": True}
    return solve(name, cost, num_heads, num_kv_heads, **asked, **options)


@pytest.mark.parametrize("name", UNEQUAL_SOLVERS)
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.data())
def test_unequal_groups_are_a_partition_into_as_many_as_asked(name: str, num_heads: int, data: st.DataObject) -> None:
    num_kv_heads = data.draw(st.integers(1, num_heads))
    groups = solve_unequal(name, pairwise_cost(num_heads), num_heads, num_kv_heads, **FEW_TRIES.get(name, {}))
    assert (groups.num_heads, groups.num_kv_heads) == (num_heads, num_kv_heads)
    assert groups == Groups.of(groups.group_of_head)


@pytest.mark.parametrize("seed", range(4))
def test_the_exact_search_of_unequal_groups_is_exact(seed: int) -> None:
    cost = generic_cost(seed)
    every = [labels for labels in itertools.product(range(3), repeat=6) if len(set(labels)) == 3]
    cheapest = min(total(cost, Groups.of(labels)) for labels in every)
    equal(total(cost, solve("exact", cost, 6, 3, unequal=True)), cheapest)


@pytest.mark.parametrize("name", sorted({*UNEQUAL_SOLVERS} - {"exact"}))
def test_searches_of_unequal_groups_find_the_odd_head(name: str) -> None:
    """Seven equal heads and one other: no equal groups are right."""
    spots = torch.tensor([0.0, 0.01, 0.02, 5.0, 0.03, 0.04, 0.05, 0.06])
    difference_and_tolerance = (spots[:, None] - spots).abs().double()
    cost = SetCost(
        lambda sets: difference_and_tolerance[sets[:, :, None], sets[:, None, :]].sum((1, 2)) / 2, cheap=True
    )
    found = solve_unequal(name, cost, 8, 2, **FEW_TRIES.get(name, {}))
    assert sorted(found.sizes) == [1, 7] and found.members[found.sizes.index(1)] == (3,)


@pytest.mark.parametrize("seed", range(3))
def test_swap_is_never_worse_than_evolution(seed: int) -> None:
    """On costs that are sums over pairs and on the weight-sharing error, in equal groups and in others."""
    for cost in (pairwise_cost(seed), cost_of("wse", random_site("halves", 16))):
        for unequal in (False, True):
            evolved = solve("qcqa", cost, 16, 4, seed, unequal=unequal)
            assert total(cost, solve("swap", cost, 16, 4, seed, unequal=unequal)) <= total(cost, evolved) * (1 + 1e-12)


def test_what_is_too_much_to_try_is_refused() -> None:
    with pytest.raises(UserError, match="choose --group swap"):
        solve("exact", generic_cost(0), 32, 4)
    with pytest.raises(UserError, match="at most 14 heads"):
        solve("exact", generic_cost(0), 15, 4, unequal=True)


def test_many_costs_are_those_one_by_one() -> None:
    site = random_site("partial pairs", 6)
    sets = [*itertools.combinations(range(6), 2), *itertools.combinations(range(6), 3), (0,), (0, 1, 2, 3, 4, 5)]
    for name in plugins.names(costs):
        together, alone = many(cost_of(name, site), sets), [cost_of(name, site)(members) for members in sets]
        assert_tight(torch.tensor(together), torch.tensor(alone))
        twice = many(summed([cost_of(name, site)] * 2), sets)
        assert_tight(torch.tensor(twice), 2 * torch.tensor(alone))


def test_weight_sharing_error_is_the_distance_from_the_mean() -> None:
    """QCQA's definition spelled out; for two heads half the squared distance."""
    site = random_site("halves", 5)
    cost = cost_of("wse", site)
    rows = torch.cat([site.heads.k.flatten(1), site.heads.v.flatten(1)], 1).double()
    for members in [(0, 1), (1, 3, 4), (0, 1, 2, 3, 4)]:
        chosen = rows[list(members)]
        equal(cost(members), float((chosen - chosen.mean(0)).square().sum()), 100)


def test_the_cosine_of_activations_costs_what_pooling_them_loses() -> None:
    """From the activations themselves, each head's scaled to length 1: half the squared distances from the mean of keys and of values."""
    site = random_site("halves", 5)
    cost, x = cost_of("cosine", site), site.x.flatten(0, 1)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # the bias is the last column
    found = [torch.einsum("tm,hdm->htd", x, weight).flatten(1) for weight in (site.heads.k, site.heads.v)]
    for members in [(0, 1), (1, 3, 4), (0, 1, 2, 3, 4), (2,)]:
        chosen = [torch.nn.functional.normalize(rows, dim=1)[list(members)] for rows in found]
        equal(cost(members), sum(float((rows - rows.mean(0)).square().sum()) for rows in chosen) / 2, 100)


def test_a_dead_head_is_like_no_other() -> None:
    site = random_site("halves", 4)
    k, v = site.heads.k.clone(), site.heads.v.clone()
    k[0], v[0] = 0, 0
    site = replace(site, heads=replace(site.heads, k=k, v=v))
    for name in ("procrustes", "cosine", "absorb", "wse"):
        assert all(math.isfinite(cost_of(name, site)(pair)) for pair in itertools.combinations(range(4), 2))


def test_aligned_cosines_cost_in_groups_of_any_size_what_pooling_loses() -> None:
    """A group's pairs over half its size, so that one large group is no dearer than its heads' unlikeness."""
    cost = cost_of("procrustes", random_site("halves", 5))
    for members in [(0, 1), (1, 3, 4), (0, 1, 2, 3, 4), (2,)]:
        pairs = [cost(pair) for pair in itertools.combinations(members, 2)]
        equal(cost(members), sum(pairs) * 2 / len(members), 100)


@EVERY_COST
@EVERY_FREEDOM
@pytest.mark.parametrize(("num_kv_heads", "num_copies"), [(4, 2), (2, 4)])
def test_the_exact_search_finds_planted_groups(name: str, freedom: str, num_kv_heads: int, num_copies: int) -> None:
    check_planted(name, freedom, num_kv_heads, num_copies)


@EVERY_COST
@pytest.mark.parametrize("freedom", ["halves", "partial pairs"])
def test_local_search_finds_planted_groups(name: str, freedom: str) -> None:
    assert plugins.option_defaults(swap.group)["exact_up_to"] < 16
    check_planted(name, freedom, 4, 4)


def check_planted(name: str, freedom: str, num_kv_heads: int, num_copies: int) -> None:
    few = random_site(freedom, num_kv_heads, num_copies)
    hide = repeated_random_equivalent if name in ("absorb", "procrustes") else shuffled_copies
    site = replace(few, heads=hide(few.heads, num_copies, seed=4))
    expected = planted(site.heads)
    assert expected.sizes == (num_copies,) * num_kv_heads and not expected.is_contiguous
    assert solve("swap", cost_of(name, site), num_kv_heads * num_copies, num_kv_heads) == expected


@EVERY_COST
@SOME
@given(cases())
def test_a_cost_is_of_a_set_and_never_negative(name: str, case: tuple[RandomSite, Groups]) -> None:
    site, groups = case
    cost = cost_of(name, site)
    for members in groups.members:
        assert cost(members) >= -1e-12
        equal(cost(members[::-1]), cost(members), len(members) ** 2)
        if len(members) == 1:
            assert cost(members) == 0


@EVERY_COST
@EVERY_FREEDOM
def test_a_cost_does_not_care_how_heads_are_named(name: str, freedom: str) -> None:
    site = random_site(freedom, 6)
    order = [3, 5, 0, 4, 1, 2]
    moved = {role: getattr(site.heads, role)[order] for role in ("q", "k", "v", "o")}
    gains = {role: getattr(site.heads, role) for role in ("q_gain", "k_gain")}
    moved |= {role: gain[order] for role, gain in gains.items() if gain is not None and gain.ndim == 2}
    cost, renamed = cost_of(name, site), cost_of(name, replace(site, heads=replace(site.heads, **moved)))
    for members in itertools.chain(itertools.combinations(range(6), 2), itertools.combinations(range(6), 3)):
        there = renamed(tuple(sorted(order.index(head) for head in members)))
        equal(there, cost(members))
        assert cost(members) > 1e-5


@EVERY_COST
@EVERY_FREEDOM
@pytest.mark.parametrize("copy", ["identical", "transformed"])
def test_copies_share_for_nothing(name: str, freedom: str, copy: str) -> None:
    few = random_site(freedom, 2, 3)
    copies = COPIES_THAT_DIFFER_BY[plugins.load(costs, name, CostMethod).undoes]
    heads = few.heads.expand(6) if copy == "identical" else copies(few.heads, 3, seed=5)
    cost = cost_of(name, replace(few, heads=heads))
    for members in planted(heads).members:
        equal(cost(members), 0.0)
    assert cost((0, 1, 2, 3, 4, 5)) > 1e-2


@EVERY_FREEDOM
def test_the_cost_of_absorb_is_the_same_for_random_equivalents(freedom: str) -> None:
    """Not of copies alone: heads that differ cost the same however they are written."""
    site = random_site(freedom, 4, 2)
    hidden = replace(site, heads=random_equivalent(site.heads, seed=6))
    pairs = list(itertools.combinations(range(4), 2))
    plain, seen = (sorted(map(cost_of("absorb", s), pairs)) for s in (site, hidden))
    for found, expected in zip(seen, plain, strict=True):
        equal(found, expected)


def test_a_damaged_number_of_heads_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="expected at most 65536 heads, got 1000000000000"):
        check_group_count("config.json", 10**12, 8)
