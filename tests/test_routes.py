"""Laws of the pages in headfold/runtime/routes: valid maps, fair cuts, and the published numbers, worked out by hand."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_tight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headfold import routing
from headfold.core import plugins
from headfold.core.errors import UserError
from headfold.core.methods import RouteMethod
from headfold.core.routes import Norms, RouteState, apportion, even, runs
from headfold.runtime import routes
from headfold.runtime.routes import dgqa, kdgqa, pgqa

NAMES = plugins.names(routes)
PUBLISHED = [
    name for name in NAMES if "published" in plugins.option_defaults(plugins.load(routes, name, RouteMethod).route)
]
OPTIONS = [*NAMES, "dgqa:window=2", "dgqa:difference=true,window=2", "pgqa:strength=0.5"]
FORMS = [*OPTIONS, *(f"{name}:published=true" for name in PUBLISHED), "dgqa:published=true,difference=true,window=2"]
HEADS, GROUPS = 8, 3
SOME = settings(max_examples=100, deadline=None, derandomize=True, database=None)
NUMBERS = st.integers(0, 1000)


def norms(*samples: Sequence[float]) -> Norms:
    both = torch.tensor(samples, dtype=torch.float64)
    return Norms(both, both)


def fresh(num_heads: int = HEADS, num_kv_heads: int = GROUPS, **known: Any) -> RouteState:
    nothing = torch.zeros(num_kv_heads, dtype=torch.float64)
    return RouteState(even(num_heads, num_kv_heads), **{"kept": nothing, "mean": nothing, **known})


@SOME
@given(st.lists(NUMBERS, min_size=1, max_size=9), st.integers(0, 24), st.floats(1e-3, 1e3))
def test_the_repaired_cut_is_fair(shares: list[int], spare: int, scale: float) -> None:
    """It sums up, leaves nobody out, gives a larger share no fewer, and does not feel the unit."""
    num_heads = len(shares) + spare
    sizes = apportion(shares, num_heads)
    assert sum(sizes) == num_heads and min(sizes) >= 1
    assert all(a >= b for r, a in zip(shares, sizes, strict=True) for s, b in zip(shares, sizes, strict=True) if r > s)
    assert apportion([share * scale for share in shares], num_heads) == sizes
    quotas = [spare * share / sum(shares) if sum(shares) else spare / len(shares) for share in shares]
    assert all(abs(size - 1 - quota) < 1 + 1e-6 for size, quota in zip(sizes, quotas, strict=True))


@pytest.mark.parametrize(
    ("shares", "num_heads", "sizes"),
    [
        ((0, 0, 0), 8, (3, 3, 2)),
        ((0, 1, 1), 8, (1, 4, 3)),  # 5 spare: 0, 2.5, 2.5
        ((0, 0.5, 1), 9, (1, 3, 5)),  # 6 spare: 0, 2, 4
        ((0.1, 0.2, 0.3), 6, (2, 2, 2)),  # 3 spare: ½, 1, 1½, so the first half wins the last one
        ((0, 0, 7), 3, (1, 1, 1)),
    ],
)
def test_repaired_cuts_by_hand(shares: Sequence[float], num_heads: int, sizes: tuple[int, ...]) -> None:
    assert apportion(shares, num_heads) == sizes


@pytest.mark.parametrize(
    ("lengths", "num_heads", "sizes"),
    [
        ((1, 2, 3), 6, (0, 2, 4)),  # r = 0, ½, 1: exact, and nobody reads the first
        ((0, 1, 1), 5, (1, 2, 2)),  # 2.5 and 2.5 round to 2 both, and the first smallest wins one
        ((0, 1, 1), 7, (0, 3, 4)),  # 3.5 and 3.5 round to 4 both, and the first largest loses one
        ((5, 6, 8, 9), 8, (0, 1, 3, 4)),  # r = 0, ¼, ¾, 1
        ((0, 3, 3, 3), 8, (0, 2, 3, 3)),  # 2⅔ each round to 3: 9, and the first largest loses one
        ((10, 10, 10, 11), 8, (0, 0, 0, 8)),
    ],
)
def test_the_published_kdgqa_by_hand(lengths: Sequence[float], num_heads: int, sizes: tuple[int, ...]) -> None:
    state = fresh(num_heads, len(lengths))
    assert kdgqa.route(state, norms(lengths), False, published=True).sizes == sizes


def reference(lengths: Sequence[float], num_heads: int, minmax: bool) -> list[int]:
    """Of 2408.08454, without its corrections, on floats."""
    low, high = min(lengths), max(lengths)
    shares = [(n - low) / (high - low) for n in lengths] if minmax else list(lengths)
    whole = [num_heads * share / sum(shares) for share in shares]
    floors = [int(x) for x in whole]
    return [f + (x - f > 0.5 or (x - f == 0.5 and f % 2)) for f, x in zip(floors, whole, strict=True)]


@SOME
@given(st.lists(NUMBERS, min_size=2, max_size=8, unique=True), st.integers(8, 32), NUMBERS)
def test_published_cuts_are_the_formula_and_its_corrections(lengths: list[int], num_heads: int, seed: int) -> None:
    by_key = kdgqa.route(fresh(num_heads, len(lengths)), norms(lengths), True, published=True)
    expected = reference(lengths, num_heads, minmax=True)
    while sum(expected) != num_heads:
        wrong = num_heads - sum(expected)
        at = expected.index(min(expected) if wrong > 0 else max(expected))
        expected[at] += 1 if wrong > 0 else -1
    assert by_key.sizes == tuple(expected) and by_key.count == 1
    drawn = dgqa.route(fresh(num_heads, len(lengths)), norms(lengths), False, published=True, seed=seed)
    published_rounding = reference(lengths, num_heads, minmax=False)
    assert sum(drawn.sizes) == num_heads and min(drawn.sizes) >= 0
    wrong = num_heads - sum(published_rounding)
    moved = [a - b for a, b in zip(drawn.sizes, published_rounding, strict=True)]
    assert sum(moved) == wrong and all(step * wrong >= 0 for step in moved)


def test_equal_norms_are_refused_where_the_paper_divides_by_zero() -> None:
    for page, state in ((kdgqa, fresh()), (dgqa, fresh(kept=torch.ones(GROUPS, dtype=torch.float64)))):
        options = {"difference": True} if page is dgqa else {}
        with pytest.raises(UserError, match=r"published shares are 0/0; leave published=true out") as refusal:
            page.route(state, norms((1, 1, 1)), True, published=True, **options)
        assert "\n" not in str(refusal.value)
        assert sum(page.settle(page.route(state, norms((1, 1, 1)), True, **options)).sizes) == HEADS


def test_the_published_dgqa_over_windows() -> None:
    """Steps 0, 3, 6 count, c is divided by the window each time; outside training c is the last batch."""
    first, second = (3.0, 1.0, 4.0), (1.0, 1.0, 2.0)
    state = fresh()
    batches = [first, (9, 9, 1), (9, 1, 9), second]
    for batch in batches:
        state = dgqa.route(state, norms(batch), True, published=True, window=3)
    c = [(0 + a) / 3 for a in first]
    rho = [0.9 * n + 0.1 * k for n, k in zip(second, c, strict=True)]
    assert rho == pytest.approx([1.0, 0.9 + 1 / 30, 1.8 + 4 / 30]) and state.sizes == (2, 2, 4)
    assert state.kept.tolist() == pytest.approx([(k + n) / 3 for n, k in zip(second, c, strict=True)])
    assert state.step == 4 and state.draws == 2
    outside = dgqa.route(state, norms(first, first), False, published=True, window=3)
    assert outside.kept.tolist() == [6, 2, 8] and outside.step == 4 and outside.sizes == (3, 1, 4)
    differing = dgqa.route(outside, norms((6, 3, 11)), False, published=True, difference=True)
    assert differing.sizes == (0, 2, 6)  # |c − n| = 0, 1, 3


def test_chance_of_the_published_dgqa_is_seeded() -> None:
    """3.5 and 3.5 round to 8 of 7: one of the two loses one, or nobody can below 0."""
    found = {dgqa.route(fresh(7), norms((0, 1, 1)), False, published=True, seed=seed).sizes for seed in range(20)}
    assert found == {(0, 3, 4), (0, 4, 3)}
    again = {dgqa.route(fresh(7), norms((0, 1, 1)), False, published=True, seed=5).sizes for _ in range(3)}
    assert len(again) == 1
    assert dgqa.corrected([0, 0, 1], 0, random.Random(0)) == (0, 0, 0)


@pytest.mark.parametrize("difference", [False, True])
def test_the_repaired_dgqa_over_windows(difference: bool) -> None:
    """A window's mean, by sample; a true moving average, or the last mean; nothing moves outside training."""
    state, options = fresh(), {"difference": difference, "window": 2}
    one = dgqa.route(state, norms((2, 2, 8)), True, **options)
    assert one.sizes == even(HEADS, GROUPS) and one.count == 1
    assert dgqa.route(one, norms((9, 0, 0)), False, **options) is one
    two = dgqa.route(one, norms((1, 1, 1), (0, 3, 0)), True, **options)  # means 1, 2, 3
    assert two.sizes == apportion((1, 2, 3), HEADS) == (2, 3, 3) and two.count == 0
    assert two.kept.tolist() == pytest.approx([1, 2, 3] if difference else [0.9, 1.8, 2.7])
    later = dgqa.settle(dgqa.route(two, norms((5, 2, 3)), True, **options), **options)
    rho = [4, 0, 0] if difference else [4.59, 1.98, 2.97]
    assert later.sizes == apportion(rho, HEADS)
    assert later.kept.tolist() == pytest.approx([5, 2, 3] if difference else rho)


def test_the_repaired_kdgqa_keeps_a_mean() -> None:
    """Batches cut for themselves; outside, the mean over samples does, whoever asks."""
    state = kdgqa.route(fresh(), norms((0, 0, 5), (0, 0, 5), (0, 0, 5)), True)
    state = kdgqa.route(state, norms((0, 5, 0)), True)
    assert state.sizes == (1, 6, 1) and state.count == 4
    outside = kdgqa.route(state, norms((9, 0, 0)), False)  # r = 0, ⅓, 1 of 5 spare
    assert outside.sizes == apportion((0, 1, 3), HEADS) == (1, 2, 5)
    assert kdgqa.route(fresh(), norms((9, 0, 0)), False).sizes == even(HEADS, GROUPS)


def test_the_noise_of_pgqa() -> None:
    """Published, each row's own mean and spread are taken from it; repaired, noise has no mean, and is for training alone."""
    rows = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    by_head = rows.transpose(1, 2).flatten(2)

    def noise(**options: Any) -> Tensor:
        training = options.pop("training", True)
        found = pgqa.perturb(rows, (3, 3), training, torch.Generator().manual_seed(1), **options)
        return by_head - found.transpose(1, 2).flatten(2)

    published = noise(published=True, training=False)
    assert_tight(published.mean(2), by_head.mean(2))
    assert_tight(published.std(2), by_head.std(2))
    standard = (published - published.mean(2, keepdim=True)) / published.std(2, keepdim=True)
    for group in standard.split(3, 1):
        lowest = group.amin(2)  # U(0, 1) without 0, and the diagonal that was set to it
        assert all(group[s, h, h] == lowest[s, h] for s in range(2) for h in range(3))
    assert_tight(noise(strength=0.5), 0.5 * (published - published.mean(2, keepdim=True)))
    assert torch.equal(pgqa.perturb(rows, (3, 3), False, torch.Generator()), rows)


@pytest.mark.parametrize("form", FORMS)
@SOME
@given(batches=st.lists(st.lists(NUMBERS, min_size=GROUPS, max_size=GROUPS, unique=True), min_size=1, max_size=4))
def test_maps_are_valid(form: str, batches: list[list[int]]) -> None:
    """Every query has a K/V head, in order; repaired, every K/V head a query."""
    method, state = routing.parse(form), fresh()
    for number, batch in enumerate(batches):
        if method.options.get("difference") and batch in batches[:number]:
            return  # 0/0, refused
        state = method(state, norms(batch), number % 2 == 0, seed=3)
        assert sum(state.sizes) == HEADS and len(state.sizes) == GROUPS
        kv_of_query = runs(state.sizes)
        assert list(kv_of_query) == sorted(kv_of_query) and set(kv_of_query) <= set(range(GROUPS))
        assert min(state.sizes) >= (0 if method.options.get("published") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_pages_say_what_they_are(name: str) -> None:
    """A help line, a paper, whether the published form depends on the batch; and they see tensors and integers alone."""
    line, page = plugins.summary(routes, name), plugins.documentation(routes, name)
    assert line[0].isupper() and line.endswith(".") and len(line) <= 140
    assert "2408.08454" in page or "2305.13245" in page
    assert plugins.load(routes, name, RouteMethod).published_depends_on_batch <= (name in PUBLISHED)
    imported = [
        line for line in (Path(routes.__path__[0]) / f"{name}.py").read_text().splitlines() if line.startswith("from .")
    ]
    assert all(line.startswith("from ...core") for line in imported)
