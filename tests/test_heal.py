"""Healing brings every attention's answer nearer to the original's on data it is not trained on, and is never a loss there."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs
from kinds import COVER
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_fold import CALIBRATED, readable, same_bytes  # noqa: F401 (a fixture)
from test_refit import energy
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_sites
from torch import Tensor

import headfold
from headfold import calibration
from headfold.calibration import batches_in_order, mask_of
from headfold.conversion import site_files
from headfold.core.errors import UserError
from headfold.core.fitted import FittedHeads
from headfold.core.heads import Heads
from headfold.families.layout import write_heads
from headfold.families.spec import Site
from headfold.refine import heal as healing
from headfold.refine.blocks import recorded_calls
from headfold.refine.heal import heal, tokens_per_block
from headfold.refine.recorded import RecordedCall, RecordedSite

NUM_ITEMS = 16


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item each: 14 to train on, two held back."""
    monkeypatch.setattr(healing, "BATCH_TOKENS", 1)
    monkeypatch.setattr(calibration, "ITEMS_PER_BATCH", 1)


def spoilt(site: Site, heads: Heads) -> Heads:
    """Every projection off by a tenth, in what the checkpoint has room for."""
    generator = torch.Generator().manual_seed(0)
    wrong = {}
    for field in ("q", "k", "v", "o"):
        tensor = getattr(heads, field)
        noise = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator) * tensor.std() / 10
        if field != "o":
            noise[..., -1] *= bool({field, "qkv"} & set(site.biases))
        wrong[field] = tensor + noise
    return dataclasses.replace(heads, **wrong)


STEPS = 64
"""Few, but enough that every family gains."""


def tokens_of(name: str, steps: int) -> int:
    """Images and recordings count as a token each."""
    return steps * calibration.total_tokens(tiny_sample(name, NUM_ITEMS)) // NUM_ITEMS


@cache
def healed(name: str, rate: float = 0.02, steps: int = STEPS) -> tuple[dict[str, dict[str, Tensor]], list[int]]:
    """Every site of a tiny model from spoilt heads, and the tokens that progress heard."""
    directory, heard = tiny_checkpoint(name), []
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    found = heal(
        stock_model(directory), [site for site, _ in pairs.values()], lambda site: spoilt(*pairs[site.name]),
        tiny_sample(name, NUM_ITEMS), tokens=tokens_of(name, steps), rate=rate, progress=heard.append,
    )  # fmt: skip
    return found, heard


@torch.no_grad()
def lacking(name: str, site: Site, heads: Heads, batch: Mapping[str, Tensor]) -> float:
    model = stock_model(tiny_checkpoint(name))
    recorded = [
        RecordedCall(call, answer, mask_of(site, batch, answer, queries=True))
        for _, call, answer in recorded_calls(model, [site], batch)
    ]
    replay = RecordedSite(model.get_submodule(site.module), site, recorded, range(site.num_heads)).run(heads, 0)
    return energy(replay.target - replay.output) / energy(replay.target)


def with_fitted(heads: Heads, fitted: FittedHeads) -> Heads:
    return fitted.to("cpu", torch.float64).onto(heads)


@pytest.mark.parametrize("name", COVER)
def test_what_is_held_back_is_answered_better(name: str) -> None:
    """On the last item, which no step saw; gradients are those of every family."""
    found, _ = healed(name)
    *_, held = batches_in_order(tiny_sample(name, NUM_ITEMS), 1)
    for site, heads in tiny_sites(tiny_checkpoint(name)):
        before = lacking(name, site, spoilt(site, heads), held)
        assert lacking(name, site, with_fitted(heads, found[site.name]), held) < 0.9 * before


@pytest.mark.parametrize("name", COVER)
def test_only_what_the_checkpoint_has_room_for_changes(name: str) -> None:
    found, _ = healed(name)
    for site, heads in tiny_sites(tiny_checkpoint(name)):
        fitted, before = found[site.name], spoilt(site, heads)
        assert fitted.is_complete and (fitted.o_bias is None) == (heads.o_bias is None)
        for field, tensor in fitted.to_tensors().items():
            assert tensor.shape == getattr(before, field).shape and tensor.dtype == torch.float32
            if not field.endswith("_gain"):  # of norms, which are not trained
                assert_differs(tensor, getattr(before, field))
        for field in {"q", "k", "v"} - {"q" if "q" in site.biases else ""}:
            if not {field, "qkv"} & set(site.biases):
                assert_bitwise(getattr(fitted, field)[..., -1], getattr(before, field)[..., -1].float())
        assert write_heads(site, with_fitted(before, fitted)).keys() == write_heads(site, heads).keys()


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_steps_too_large_are_taken_back(name: str) -> None:
    """Of the heads met on the way the best are kept, those at the start among them."""
    found, _ = healed(name, rate=1e9, steps=20)
    for site, heads in tiny_sites(tiny_checkpoint(name)):
        for field, tensor in found[site.name].to_tensors().items():
            assert_bitwise(tensor, getattr(spoilt(site, heads), field).float())


def test_a_perfect_fold_stays_as_it_is() -> None:
    directory = tiny_checkpoint("llama")
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    sites = [site for site, _ in pairs.values()]
    found = heal(
        stock_model(directory), sites, lambda site: pairs[site.name][1], tiny_sample("llama", NUM_ITEMS), tokens=1000
    )
    for site, heads in pairs.values():
        for field, tensor in found[site.name].to_tensors().items():
            assert_bitwise(tensor, getattr(heads, field).float())


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_progress_ends_where_it_should(name: str) -> None:
    _, heard = healed(name)
    assert sum(heard) == tokens_per_block(tiny_sample(name, NUM_ITEMS), tokens_of(name, STEPS)) * len(
        tiny_sites(tiny_checkpoint(name))
    )


def test_a_seed_draws_the_batches() -> None:
    directory = tiny_checkpoint("llama")
    (site, heads), *_ = tiny_sites(directory)
    model = stock_model(directory)
    first, again, other = (
        heal(model, [site], lambda site: spoilt(site, heads), tiny_sample("llama", NUM_ITEMS), tokens=1000, seed=seed)[
            site.name
        ]
        for seed in (0, 0, 1)
    )
    for field, tensor in first.to_tensors().items():
        assert_bitwise(tensor, getattr(again, field))
        assert_differs(tensor, getattr(other, field))


HEALED: dict[str, Any] = dict(
    kv_heads=2, calibration="self", **CALIBRATED, heal=True, heal_by="block", heal_tokens=2048
)
"""On so few tokens a refit fits the held-back ones too, and nothing is left to heal."""


def test_a_healed_fold_is_verified_and_says_so(readable: Path, tmp_path: Path) -> None:  # noqa: F811
    plain, found = (
        headfold.fold(readable, tmp_path / name, **{**HEALED, "refit": False, **how})
        for name, how in (("plain", dict(heal=False, heal_tokens=None, heal_by=None)), ("healed", {}))
    )
    assert found.verification.passed and (plain.healed, found.healed) == (0, 2048) and "heal" in found.seconds
    losses = [headfold.eval(made.out, reference=readable, limit=512, context=32).kl for made in (plain, found)]
    assert losses[1] < losses[0]
    card = (found.out / "README.md").read_text()
    assert "trained alone, on 2,048 tokens" in card and "--heal --heal-by block --heal-tokens 2048" in card
    assert "Nothing was trained" in (plain.out / "README.md").read_text()


def test_a_source_that_has_more_is_healed_on_more(readable: Path, tmp_path: Path) -> None:  # noqa: F811
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"the {n}th line of {n * n} lines, and no more than {n + 1}." for n in range(400)))
    how = {**HEALED, "calibration": str(source), "refit": False}
    made = headfold.fold(readable, tmp_path / "out", **how)
    facts = [
        line
        for line in (made.out / "README.md").read_text().splitlines()
        if line.startswith(("- Calibration:", "- Healed"))
    ]
    assert "tokens 512" in facts[0] and "tokens 2048" in facts[1]


@pytest.mark.parametrize("merge", ["mean", "absorb"])
def test_healing_goes_on_at_the_block_where_it_was(
    merge: str,
    readable: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed when the first block is healed; then the same bytes as without. Mean pooling leaves Q alone, and healing does not."""
    how = {**HEALED, "merge": merge, "group": "contiguous"}
    headfold.fold(readable, tmp_path / "calm", **how)
    put, done = site_files.SiteFiles.put, []

    def killed(self: site_files.SiteFiles, site: str, *rest: Any) -> None:
        put(self, site, *rest)
        done.append(self._directory.name)
        if done[-1] == "heal":
            raise KeyboardInterrupt

    monkeypatch.setattr(site_files.SiteFiles, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        headfold.fold(readable, tmp_path / "out", **how)
    monkeypatch.setattr(site_files.SiteFiles, "put", put)
    seen: list[str] = []
    monkeypatch.setattr(
        site_files.SiteFiles, "put", lambda self, site, *rest: (seen.append(site), put(self, site, *rest))
    )
    headfold.fold(readable, tmp_path / "out", **how)
    assert done.count("heal") == 1 and len(seen) == 1
    same_bytes(tmp_path / "calm", tmp_path / "out")


def test_tokens_to_heal_with_need_healing(readable: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="--heal --heal-tokens N"):
        headfold.fold(readable, tmp_path / "out", **{**HEALED, "heal": False, "heal_by": None})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
