"""Read-outs fitted over distances: the averages are averages, and the error is what it says and falls."""

import json
from pathlib import Path

import pytest
import torch
from grades import assert_tight
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_checkpoint
from torch import Tensor

import headfold
from headfold.conversion.source import open_source
from headfold.core import readout
from headfold.core.distances import NUM_BINS, Distances, bin_of, edges
from headfold.core.heads import KeyFreedom
from headfold.core.readout import DistanceAverage, FittedReadout, Frame, fit

FREQUENCIES = (1.0, 0.2, 0.01)
LAYOUTS = {
    "halves": KeyFreedom("rope-halves", 6, frequencies=FREQUENCIES, context=40),
    "pairs": KeyFreedom("rope-pairs", 6, True, frequencies=FREQUENCIES, context=40),
    "partial": KeyFreedom("rope-halves", 4, frequencies=FREQUENCIES[:2], context=40),
}
DIM, MEMBERS = 6, 3
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def short(num_kv_heads: int = MEMBERS) -> Distances:
    """Mass on the first distances alone, which have a bin each, other for every head."""
    mass = torch.rand(num_kv_heads, NUM_BINS, dtype=torch.float64)
    mass[:, 20:] = 0
    return Distances(mass / mass.sum(1, keepdim=True))


def rotation(freedom: KeyFreedom, distance: int, slots: int = 1) -> Tensor:
    """What a key so many tokens back is turned by, spelled out."""
    turn = torch.eye(DIM, dtype=torch.float64)
    for (a, b), frequency in zip(freedom.planes().tolist(), freedom.frequencies, strict=True):
        angle = torch.tensor(-frequency * distance, dtype=torch.float64)
        turn[a, a] = turn[b, b] = angle.cos()
        turn[a, b], turn[b, a] = -angle.sin(), angle.sin()
    return torch.block_diag(*[turn] * slots)


@given(st.integers(0, 2**21))
def test_every_distance_has_the_bin_around_it(distance: int) -> None:
    bin_ = int(bin_of(torch.tensor(distance)))
    assert edges()[bin_] <= distance < edges()[bin_ + 1]


@given(st.floats(0, 3.2), st.integers(0, NUM_BINS - 200))
def test_a_mean_rotation_is_the_mean_over_every_distance(frequency: float, bin_: int) -> None:
    shares = torch.zeros(1, NUM_BINS, dtype=torch.float64)
    shares[0, bin_] = 1
    inside = torch.arange(edges()[bin_], edges()[bin_ + 1], dtype=torch.float64)
    expected = torch.polar(torch.ones_like(inside), -frequency * inside).mean()
    found = Distances(shares).average(torch.tensor([frequency], dtype=torch.float64))[0, 0]
    assert abs(found - expected) < 1e-9


def test_assumed_distances_end_with_the_context_and_favour_near_ones() -> None:
    shares = Distances.assumed(2, 100).shares
    assert_tight(shares.sum(1), torch.ones(2, dtype=torch.float64))
    end = int(bin_of(torch.tensor(100)))
    assert not shares[:, end + 1 :].any() and (shares[0, :40].diff() < 0).all()
    mixed = Distances.measured(torch.eye(NUM_BINS)[:1], 100).shares
    assert mixed[0, 0] > 0.8 and (mixed[0, :end] > 0).all()


@EVERY_LAYOUT
@pytest.mark.parametrize("slots", [1, 2])
def test_averages_are_those_of_rotations_spelled_out(layout: str, slots: int) -> None:
    freedom, distances = LAYOUTS[layout], short()
    own, shared = Frame.of(freedom, DIM), Frame.of(freedom, DIM, slots)
    x = torch.randn(MEMBERS, DIM, slots * DIM, dtype=torch.float64)
    for way in ("there", "back"):
        expected = torch.zeros_like(x)
        for distance in range(20):
            a, b = rotation(freedom, distance), rotation(freedom, distance, slots)
            turned = a.mT @ x @ b if way == "there" else a @ x @ b.mT
            expected += distances.shares[:, distance, None, None] * turned
        average = DistanceAverage(own, shared, distances)
        found = (average if way == "there" else average.adjoint)(x[:, own.order][:, :, shared.order])
        assert_tight(found, expected[:, own.order][:, :, shared.order])


def spelled_out(
    freedom: KeyFreedom, distances: Distances, keys: Tensor, queries: Tensor, mix: Tensor, readout: Tensor
) -> float:
    """The mean squared error of logits over its energy, one distance at a time."""
    lost = energy = 0.0
    gram = keys.flatten(2).flatten(0, 1)
    for i, (query, read) in enumerate(zip(queries, readout, strict=True)):
        select = torch.zeros(DIM, MEMBERS * DIM, dtype=torch.float64)
        select[:, i * DIM : (i + 1) * DIM] = torch.eye(DIM)
        for distance in range(20):
            turn, wide = rotation(freedom, distance), rotation(freedom, distance, read.shape[1] // DIM)
            missed = turn @ select - read @ wide @ mix
            share = float(distances.shares[i, distance])
            lost += share * float(torch.trace(query @ missed @ gram @ missed.mT))
            energy += share * float(torch.trace(query @ turn @ select @ gram @ select.mT @ turn.mT))
    return lost / energy


def moments(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(MEMBERS * DIM, 30, generator=generator, dtype=torch.float64)
    queries = torch.randn(MEMBERS, DIM, 9, generator=generator, dtype=torch.float64)
    return (rows @ rows.mT).view(MEMBERS, DIM, MEMBERS, DIM), queries @ queries.mT


def start(slots: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(slots * DIM, MEMBERS * DIM, generator=generator, dtype=torch.float64)
    return mix, torch.randn(MEMBERS, DIM, slots * DIM, generator=generator, dtype=torch.float64)


@EVERY_LAYOUT
@given(seed=st.integers(0, 2**16), slots=st.integers(1, 2))
@settings(max_examples=8, deadline=None)
def test_the_error_is_what_it_says_and_falls(layout: str, seed: int, slots: int) -> None:
    freedom, distances, (keys, queries) = LAYOUTS[layout], short(), moments(seed)
    mix, readout = start(slots, seed)
    # Moments about the mean that are all there is: nothing is constant over a sequence.
    found = fit(keys, keys, queries, mix, readout, freedom, distances)
    assert isinstance(found, FittedReadout) and found.error <= found.before
    for error, m, r in ((found.before, mix, readout), (found.error, found.mix, found.readout)):
        assert error == pytest.approx(spelled_out(freedom, distances, keys, queries, m, r), rel=1e-6)


def test_planes_that_stand_still_are_as_free_as_dims_without_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "MAX_ROUNDS", 2000)
    monkeypatch.setattr(readout, "ENOUGH", 1e-9)
    keys, queries = moments(0)
    still = KeyFreedom("rope-halves", 6, frequencies=(0.0,) * 3, context=40)
    found = fit(keys, keys, queries, *start(1, 0), still, short())
    root = torch.block_diag(*[torch.linalg.cholesky(query) for query in queries])
    values = torch.linalg.eigvalsh(root.mT @ keys.flatten(2).flatten(0, 1) @ root)
    assert found.error == pytest.approx(float(values[:-DIM].sum() / values.sum()), rel=1e-3)


def test_nothing_is_done_where_frequencies_are_unknown_or_nothing_is_lost() -> None:
    keys, queries = moments(0)
    assert fit(keys, keys, queries, *start(1, 0), KeyFreedom("rope-halves", 6), short()) is None
    mix, readout = torch.zeros(MEMBERS * DIM, MEMBERS * DIM).double(), torch.zeros(MEMBERS, DIM, MEMBERS * DIM).double()
    mix += torch.eye(MEMBERS * DIM)
    for member in range(MEMBERS):
        readout[member, :, member * DIM : (member + 1) * DIM] = torch.eye(DIM)
    found = fit(keys, keys, queries, mix, readout, LAYOUTS["halves"], short())
    assert found.before < 1e-12 and torch.equal(found.mix, mix) and torch.equal(found.readout, readout)


def test_a_head_that_was_never_seen_to_attend_has_what_is_assumed() -> None:
    mass = torch.zeros(2, NUM_BINS)
    mass[0, 3] = 1
    found = Distances.measured(mass, 100).shares
    assert_tight(found[1], Distances.assumed(1, 100).shares[0])


def test_distances_end_with_the_window() -> None:
    path = tiny_checkpoint("cohere2")
    kinds = json.loads((path / "config.json").read_text())["layer_types"]
    spans = [site.key_freedom.context for site in open_source(path).sites]
    rotating = [span for span, kind in zip(spans, kinds, strict=True) if kind == "sliding_attention"]
    assert rotating and set(rotating) == {json.loads((path / "config.json").read_text())["sliding_window"]}


BUNDLED = Path(headfold.__file__).parent / "bundled"


def test_frequencies_come_from_the_config() -> None:
    freedom = open_source(BUNDLED).sites[0].key_freedom
    config = json.loads((BUNDLED / "config.json").read_text())
    assert len(freedom.frequencies) == config["head_dim"] // 2 and freedom.frequencies[0] == 1
    assert freedom.context == config["max_position_embeddings"]
    theta = config["rope_parameters"]["rope_theta"]
    assert freedom.frequencies[1] == pytest.approx(theta ** (-2 / config["head_dim"]))


def test_distances_halve_what_a_real_model_loses(tmp_path: Path) -> None:
    """At a quarter of the K/V heads, without refit."""
    headfold.calibrate(BUNDLED, tmp_path / "stats.safetensors", tokens=4096, calibration="stdlib")
    rises = {}
    for merge in ("absorb", "absorb:distances=false"):
        headfold.fold(
            BUNDLED,
            tmp_path / "out",
            kv_heads=2,
            merge=merge,
            refit=False,
            verify=False,
            force=True,
            stats=tmp_path / "stats.safetensors",
        )
        found = headfold.eval(tmp_path / "out", reference=BUNDLED, limit=4096)
        rises[merge] = found.nll - found.reference_nll
    assert 0 < rises["absorb"] < 0.5 * rises["absorb:distances=false"]
