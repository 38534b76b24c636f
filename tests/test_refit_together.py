"""A refit can end with all sites trained together, in one pass over the calibration data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_differs
from test_cli import refused, run  # noqa: F401 (a fixture)
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_fold import CALIBRATED, readable, same_bytes  # noqa: F401 (a fixture)
from test_heal import lacking, spoilt, with_fitted
from tiny import stock_model, tiny_checkpoint, tiny_sites, tiny_tokens

import headfold
from headfold import calibration, hf_models
from headfold.conversion import site_files
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.refine import distill, queries, scope
from headfold.refine.refit import refit
from headfold.refine.scope import Fits, refit_by_default

FOLDED: dict[str, Any] = dict(kv_heads=2, calibration="stdlib", **CALIBRATED)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "ONCE_TOKENS", 32)


def test_a_fold_refitted_as_a_whole_is_nearer_to_its_original_and_says_so(readable: Path, tmp_path: Path) -> None:  # noqa: F811
    more = {**FOLDED, "tokens": 4096}
    made = [headfold.fold(readable, tmp_path / by, **more, refit_by=by) for by in ("block", "model", "squares")]
    block, model, squares = made
    assert block.verification.passed and model.verification.passed and set(model.seconds) == set(block.seconds)
    plain = headfold.fold(readable, tmp_path / "plain", **more, refit=False)
    losses = [
        headfold.eval(made.out, reference=readable, limit=512, context=32).kl for made in (plain, block, model, squares)
    ]
    assert max(losses[1:]) < 0.8 * losses[0] and losses[1] != losses[2]
    assert losses[1] < losses[3] and losses[2] <= losses[3]
    cards = [(one.out / "README.md").read_text() for one in made]
    assert "attention and output, block by block" in cards[0] and "--refit-by block" in cards[0]
    assert "then all together to the model's output" in cards[1] and "--refit-by model" in cards[1]
    assert "by least squares, block by block" in cards[2] and "--refit-by squares" in cards[2]


def test_one_that_was_killed_ends_in_the_same_bytes(
    readable: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    headfold.fold(readable, tmp_path / "calm", **FOLDED, refit_by="model")
    kept, save = list[str](), site_files.save_file

    def killed(tensors: Any, path: Path, facts: Any) -> None:
        kept.append(path.parent.name)
        if kept.count("together") == 2:
            raise KeyboardInterrupt
        save(tensors, path, facts)

    monkeypatch.setattr(site_files, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        headfold.fold(readable, tmp_path / "out", **FOLDED, refit_by="model")
    monkeypatch.setattr(site_files, "save_file", save)
    headfold.fold(readable, tmp_path / "out", **FOLDED, refit_by="model")
    same_bytes(tmp_path / "calm", tmp_path / "out")


def test_large_language_models_are_refitted_as_a_whole_where_memory_holds_it(
    readable: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_source(str(readable))

    def chosen(by: str | None = None, kind: str = "text", tokens: int = 2**16, **healing: bool) -> str:
        return refit_by_default(by, source.checkpoint, source.sites, kind, tokens, "cpu", **healing)

    assert chosen() == "block" and chosen("model") == "model" and chosen(kind="audio") == "block"
    monkeypatch.setattr(scope, "_LARGE", 1)
    assert chosen() == "model" and chosen(kind="images") == "block" and chosen(heals=True) == "block"
    assert chosen(heals=True, continues=True) == "squares" and chosen("model", heals=True, continues=True) == "model"
    assert chosen(tokens=64) == "block"  # of which each input dim has too few
    monkeypatch.setattr(hf_models, "available_memory", lambda device: 2e5)
    assert chosen() == "model"  # others use it for now
    monkeypatch.setattr(scope, "total_memory", lambda device: 2e5)
    assert chosen() == "block"
    with pytest.raises(UserError, match="GiB of training, got less; give --refit-by block"):
        chosen("model")


def test_the_decoder_of_a_model_of_speech_is_refitted_as_a_whole_without_its_encoder() -> None:
    directory = str(tiny_checkpoint("whisper"))
    for encoder, heals, by in ((False, False, "model"), (True, False, "block"), (False, True, "block")):
        source = open_source(directory, encoder=encoder)
        assert refit_by_default(None, source.checkpoint, source.sites, "audio", 12, "cpu", heals=heals) == by


@pytest.mark.parametrize(
    ("tokens", "more", "by"),
    [(2**14, True, "squares"), (2**14, False, "block"), (2**17, False, "squares"), (2**18, True, "block")],
)
def test_a_refit_ends_with_squares_before_the_same_training_on_more_data(
    readable: Path,  # noqa: F811
    tokens: int,
    more: bool,
    by: str,
) -> None:
    source, fits = open_source(str(readable)), Fits(heal=True, heal_by="model")
    found, healing = fits.resolved(source.checkpoint, source.sites, "text", tokens, "cpu", more=more)
    assert (found, healing.by, healing.tokens) == (by, "model", 2**17)
    assert fits.resolved(source.checkpoint, source.sites, "images", tokens, "cpu", more=more)[0] == "block"


def test_a_fold_that_overflows_where_it_would_be_trained_keeps_its_refit(
    readable: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distill._Student, "error", lambda *_: torch.tensor(float("nan")))
    whole = headfold.fold(readable, tmp_path / "whole", **FOLDED, refit_by="model")
    alone = headfold.fold(readable, tmp_path / "alone", **FOLDED, refit_by="block")
    assert whole.verification.passed
    # Too few tokens for a block's own descent, so both refits are least squares alone.
    assert (whole.out / "model.safetensors").read_bytes() == (alone.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--refit-by", "site"), "--refit-by site: expected one of model, block, squares"),
        (("--no-refit", "--refit-by", "model"), "refit_by goes with refit"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_line(
    run: Any,  # noqa: F811
    words: tuple[str, ...],
    said: str,
    readable: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    refused(run("fold", readable, tmp_path / "out", "--kv-heads", "2", *words), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama-bias-gqa", "qwen3"])
def test_a_descent_lowers_what_least_squares_leave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all four projections, behind norms too, on data that no fit sees."""
    monkeypatch.setattr(queries, "NARROW", 0)
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", 512)
    directory = tiny_checkpoint(name)
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    plain, found = (
        refit(
            stock_model(directory), [site for site, _ in pairs.values()], lambda site: spoilt(*pairs[site.name]),
            {"input_ids": tiny_tokens(256, 16, seed=4)}, query_steps=0, value_steps=0, passes=passes,
        )
        for passes in (0, 1)
    )  # fmt: skip
    for site, heads in pairs.values():
        assert found[site.name].is_complete and not plain[site.name].is_complete
        before = with_fitted(spoilt(site, heads), plain[site.name])
        after = with_fitted(heads, found[site.name])
        for field in ("q", "k", "v"):
            assert_differs(getattr(after, field), getattr(before, field))
        held = {"input_ids": tiny_tokens(8, 16, seed=5)}
        assert lacking(name, site, after, held) < 0.97 * lacking(name, site, before, held)
