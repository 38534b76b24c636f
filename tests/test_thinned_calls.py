"""Fits of images and sound see a part of their many positions."""

from typing import Any

import pytest
import torch
from grades import assert_tight_through_float32_norms
from test_refit import site_calls
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_sites

from headfold.calibration import run
from headfold.core.fitted import FittedHeads
from headfold.refine import blocks, fitting
from headfold.refine.recorded import RecordedSite
from headfold.refine.refit import refit


@pytest.mark.parametrize(("times", "every"), [(0.5, 1), (1.1, 1), (2.1, 2), (4.9, 4), (99, 99)])
def test_calls_are_thinned(times: float, every: int) -> None:
    """What is left can be replayed."""
    directory, sample = tiny_checkpoint("vit"), tiny_sample("vit", 2)
    site, heads = tiny_sites(directory)[0]
    one = site_calls(directory, site, sample)
    calls = RecordedSite(
        stock_model(directory).get_submodule(site.module), site, [one._recorded[0]] * 30, range(site.num_heads)
    )
    calls.thin(round(30 * one.num_queries(0) / times), heads.q.device)
    assert calls.numbers == list(calls.all_numbers) == list(range(0, 30, every))
    assert_tight_through_float32_norms(calls.run(heads, calls.numbers[-1]).output, one.run(heads, 0).output)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_thinned_calls_are_shared_evenly(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headfold.refine.recorded.world_size", lambda: ranks)
    directory, sample = tiny_checkpoint("vit"), tiny_sample("vit", 2)
    site, _ = tiny_sites(directory)[0]
    one = site_calls(directory, site, sample)
    module = stock_model(directory).get_submodule(site.module)
    calls = RecordedSite(module, site, [one._recorded[0]] * 60, range(site.num_heads))
    calls.thin(round(60 * one.num_queries(0) / 3.1), torch.device("cpu"))
    shares = [sum(number % ranks == rank for number in calls.numbers) for rank in range(ranks)]
    assert 60 // 3 <= sum(shares) <= 60 and max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("name", "thinned"), [("vit", [""]), ("bert", []), ("t5", []), ("whisper", ["encoder"])])
def test_fits_of_text_see_all_of_it(name: str, thinned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: set[str] = set()

    def thin(calls: RecordedSite, positions: int, device: torch.device) -> None:
        kept.add(calls.site.stack)

    monkeypatch.setattr(RecordedSite, "thin", thin)
    directory, sample = tiny_checkpoint(name), tiny_sample(name, 8)
    sites = {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    refit(
        stock_model(directory),
        [site for site, _ in sites.values()],
        lambda site: sites[site.name][1],
        sample,
        query_steps=0,
    )
    assert kept == set(thinned)


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_what_a_fit_would_not_see_is_not_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the same heads from fewer passes of the model."""
    monkeypatch.setattr("headfold.calibration.ITEMS_PER_BATCH", 1)
    monkeypatch.setattr("headfold.calibration.RECORDINGS_PER_BATCH", 1)
    monkeypatch.setattr("headfold.refine.refit.MOST_POSITIONS", 1)
    monkeypatch.setattr(fitting, "PORTION_BYTES", 1)  # as large data are: one site at a time
    directory, sample = tiny_checkpoint(name), tiny_sample(name, 9)
    sites = {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    runs: list[int] = []

    def fitted() -> dict[str, FittedHeads]:
        runs.append(0)
        return refit(
            stock_model(directory), [site for site, _ in sites.values()], lambda site: sites[site.name][1], sample
        )

    def counted(*arguments: Any) -> Any:
        runs[-1] += 1
        return run(*arguments)

    monkeypatch.setattr(blocks, "run", counted)
    few = fitted()
    monkeypatch.setattr(fitting, "_step", lambda *_: 1)
    all_of_it = fitted()
    assert runs[0] < runs[1]
    for site, found in few.items():
        for field in ("v", "o"):
            assert torch.equal(getattr(found, field), getattr(all_of_it[site], field))
