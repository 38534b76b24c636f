"""Rotations for a quantised cache change no output, make the largest numbers of K and V smaller, and are recorded with a fold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from kinds import KINDS
from random_sites import FREEDOMS, random_site
from reference_attention import attention_output, project
from safetensors.torch import load_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_foreign import FLOAT32, case, plain_answer
from tiny import FLOAT32_NORMS, readable_checkpoint, stock_logits, tiny_checkpoint, tiny_sites
from torch import Generator, Tensor

import headfold
from headfold.checkpoint.reader import Checkpoint
from headfold.conversion import provenance
from headfold.core.errors import UserError
from headfold.core.heads import Heads
from headfold.core.plan import Plan
from headfold.core.quantised_cache import flat_rotation, rotated_for_cache
from headfold.core.stats import SiteStats
from headfold.families.spec import Site
from headfold.stats_file import write_stats

CALIBRATED: dict[str, Any] = dict(kv_heads=2, calibration="self", tokens=512, context=32)


def mean_of(heads: Heads, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(heads.k.shape[2], dtype=torch.float64, generator=generator)
    drawn[-1] = 1
    return drawn


@pytest.mark.parametrize("name", KINDS)
def test_no_model_can_see_the_rotations(name: str) -> None:
    def rotated(site: Site, heads: Heads, index: int) -> Heads:
        new = rotated_for_cache(heads, mean_of(heads), site.head_dim, seed=index)
        assert_differs(new.v, heads.v)
        assert torch.equal(new.k, heads.k.double()) == site.key_freedom.normed
        return new

    same = assert_tight_through_float32_norms if name in FLOAT32 | FLOAT32_NORMS else assert_tight
    changed = {on_disk: t for on_disk, t in case(name).changed(rotated).items() if not on_disk.endswith("sinks")}
    same(case(name).answer(tensors=changed), plain_answer(name))


@pytest.mark.parametrize("freedom", sorted(FREEDOMS))
def test_no_attention_can_see_the_rotations(freedom: str) -> None:
    site = random_site(freedom, num_kv_heads=2, queries=2)
    new = rotated_for_cache(site.heads, site.stats.mean_input(), site.heads.head_dim, seed=1)
    for x in site.x:
        assert_tight(attention_output(new, x), attention_output(site.heads, x))


@pytest.mark.parametrize("freedom", [name for name, one in FREEDOMS.items() if one.rotary_dim and not one.normed])
def test_the_mean_key_lies_halfway_between_the_dims_of_its_plane(freedom: str) -> None:
    site = random_site(freedom)
    mean = site.stats.mean_input()
    new = rotated_for_cache(site.heads, mean, site.heads.head_dim, seed=0)
    first, other = site.heads.key_freedom.planes().T
    before, after = (heads.k @ mean for heads in (site.heads, new))
    assert_tight(after[:, first], after[:, other])
    assert_tight(after[:, first], torch.hypot(before[:, first], before[:, other]) / 2**0.5)


def test_a_mean_of_one_dim_and_an_outlier_of_v_are_divided_among_all() -> None:
    """What decides the scale of a quantised block, its largest number, becomes smaller."""
    site = random_site("halves", num_kv_heads=2, bias=False)
    site.heads.k[:, 0, -1] = 50.0
    site.heads.v[:, 1] *= 50
    new = rotated_for_cache(site.heads, site.stats.mean_input(), site.heads.head_dim, seed=0)
    for role, part in (("k", 0.75), ("v", 0.8)):
        largest = [project(getattr(heads, role)[0], site.x[0]).abs().amax(1).mean() for heads in (new, site.heads)]
        assert largest[0] < part * largest[1], role


@pytest.mark.parametrize("dim", [1, 2, 5, 12, 64, 80, 128])
def test_a_flat_rotation_is_orthogonal_and_no_hadamard_matrix_undoes_it(dim: int) -> None:
    matrix = flat_rotation(dim, Generator().manual_seed(0))
    assert_tight(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
    odd = dim // (dim & -dim)
    assert matrix.abs().max() <= (1 if odd == 1 else 2**0.5) * (1 + 1e-12) / dim**0.5
    if dim > 16 and odd == 1:
        walsh = torch.ones(1, 1, dtype=torch.float64)
        while len(walsh) < dim:
            walsh = torch.kron(walsh, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) / 2**0.5
        assert (walsh @ matrix).abs().max() < 0.75


def test_a_slot_of_a_larger_head_rotates_as_a_head_of_the_original() -> None:
    """The rotation of each slot is that of a head which has these dims alone."""
    heads = random_site("partial halves", num_kv_heads=1, bias=False).heads
    wide = Heads(
        torch.cat([heads.q, heads.q], 1), torch.cat([heads.k, 2 * heads.k], 1), heads.v, heads.o, heads.groups, heads.key_freedom
    )  # fmt: skip
    mean = mean_of(heads)
    new = rotated_for_cache(wide, mean, heads.head_dim, seed=0)
    alone = rotated_for_cache(heads, mean, heads.head_dim, seed=0)
    first, second = new.k.split(heads.head_dim, 1)
    planes = heads.key_freedom.planes().flatten()
    assert_tight(first[:, planes], alone.k[:, planes])
    assert_tight(second, 2 * first)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path_factory.mktemp("source") / "readable", tokenizer)


@pytest.mark.parametrize("how", [{}, {"refit": False}, {"kv_heads": 8}], ids=["refit", "merged", "all heads kept"])
def test_a_fold_keeps_its_function_and_says_so(how: dict[str, Any], readable: Path, tmp_path: Path) -> None:
    plain, rotated, again = (tmp_path / name for name in ("plain", "rotated", "again"))
    headfold.fold(readable, plain, **CALIBRATED | how)
    result = headfold.fold(readable, rotated, quantised_cache=True, **CALIBRATED | how)
    assert result.verification and result.verification.passed
    assert_tight_through_float32_norms(stock_logits(rotated), stock_logits(plain))
    assert_differs(tiny_sites(rotated)[0][1].v.double(), tiny_sites(plain)[0][1].v.double())
    recorded = json.loads((rotated / "plan.json").read_text())
    assert recorded.pop("quantised_cache") is True and recorded == json.loads((plain / "plan.json").read_text())
    card = (rotated / "README.md").read_text()
    assert "rotated for a quantised cache" in card and "--quantised-cache" in card.rpartition("## Made by")[2]
    assert "quantised" not in (plain / "README.md").read_text()
    headfold.run(rotated / "headfold.yaml", again, model=readable)
    for file in ("model.safetensors", "plan.json", "headfold.yaml"):
        assert (again / file).read_bytes() == (rotated / file).read_bytes()


@pytest.mark.parametrize("multiple", [8, 64])
def test_it_says_where_another_engine_would_lose_by_it(
    multiple: int, readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_ROTATED_BY_LLAMA_CPP", multiple)  # the heads have 8 dims
    how = CALIBRATED | dict(refit=False, verify=False, quantised_cache=True)
    said = [note for note in headfold.fold(readable, tmp_path / "out", **how).notes if "llama.cpp rotates" in note]
    assert len(said) == (multiple == 8)


def test_keys_that_were_not_rotated_are_no_loss_to_another_engine(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "_ROTATED_BY_LLAMA_CPP", 1)
    source = readable_checkpoint(tmp_path / "normed", tokenizer, "qwen3")
    how = CALIBRATED | dict(refit=False, verify=False, quantised_cache=True)
    assert not [note for note in headfold.fold(source, tmp_path / "out", **how).notes if "llama.cpp rotates" in note]


def test_a_plan_that_says_so_is_enough_and_methods_without_statistics_get_theirs(
    readable: Path, tmp_path: Path
) -> None:
    how = CALIBRATED | dict(merge="mean", group="contiguous", refit=False)
    headfold.fold(readable, tmp_path / "out", quantised_cache=True, **how)
    headfold.fold(readable, tmp_path / "again", plan=tmp_path / "out" / "plan.json", refit=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    for name, tensor in first.items():
        assert_bitwise(second[name], tensor)


def test_what_it_needs_is_asked_for_before_anything_is_done(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    stats = tmp_path / "stats.safetensors"
    seen = {
        site.name: SiteStats({"second": SiteStats.isotropic(heads.k.shape[2] - 1).tensors["second"]}, 1)
        for site, heads in tiny_sites(source)
    }
    write_stats(stats, seen, {"model": Checkpoint.open(source).fingerprint()})
    how: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False)
    with pytest.raises(UserError, match="expected the statistic scatter"):
        headfold.fold(source, tmp_path / "out", stats=stats, quantised_cache=True, **how)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="got something else.*quantised_cache must be true or false"):
        Plan.from_json(Plan({}, "swap", "").to_json() | {"quantised_cache": 1})
