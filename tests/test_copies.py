"""Some windows come a second time, and repeat what they began with: only a fold that finds it there again predicts them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_sites, tiny_tokens
from torch import Tensor

from headfold.calibration import num_tokens
from headfold.refine import distill as distilling
from headfold.refine.copies import EVERY, SPANS, is_second, repeated, with_copies
from headfold.refine.distill import distill, total_tokens
from headfold.refine.spread import spread


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 50))
def test_one_in_so_many_comes_twice(count: int) -> None:
    found = list(repeated(range(count)))
    assert len(found) == count + count // EVERY
    seconds = [item for number, item in enumerate(found) if is_second(number)]
    assert seconds == list(range(EVERY - 1, count, EVERY))
    assert [item for number, item in enumerate(found) if not is_second(number)] == list(range(count))


@given(st.integers(1, 300), st.integers(0, 2**20))
def test_the_second_half_is_made_of_spans_of_the_first(length: int, seed: int) -> None:
    windows = torch.arange(2 * length).view(2, length)  # every token tells where it was
    found, half = with_copies(windows, drawn(seed)), max(1, length // 2)
    assert found[:, :half].equal(windows[:, :half]) and found.shape == windows.shape
    for row, window in zip(found, windows, strict=True):
        copied = row[half:]
        assert set(copied.tolist()) <= set(window[:half].tolist())
        ends = [0, *(1 + (copied.diff() != 1).nonzero()[:, 0]).tolist(), len(copied)]
        spans = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
        assert all(span >= min(SPANS[0], half) for span in spans[:-1])  # two neighbours may go on from each other


def test_copies_differ_by_window_and_by_seed() -> None:
    windows = torch.arange(400).expand(3, -1)
    first, again, other = (with_copies(windows, drawn(seed)) for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other) and not first[0].equal(first[1])


def test_a_gap_lies_between_what_is_copied_and_the_copies() -> None:
    batches = [{"input_ids": tiny_tokens(2, 40, seed=number)} for number in range(EVERY)]
    found = list(spread(repeated(batches), 90, 0, repeats=True))
    assert [not batch["input_ids"].equal(given["input_ids"]) for batch, given in zip(found, batches, strict=False)] == [
        False
    ] * EVERY
    last = found[EVERY]
    assert last["input_ids"][:, :20].equal(batches[-1]["input_ids"][:, :20])
    assert set(last["input_ids"][0, 20:].tolist()) <= set(last["input_ids"][0, :20].tolist())
    for row in last["position_ids"]:
        steps = row.diff()
        assert (steps[:19] == 1).all() and (steps[20:] == 1).all()
    assert "position_ids" not in list(spread(repeated(batches), 0, 0, repeats=True))[EVERY]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_pass_over_text_has_them_and_others_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "ONCE_TOKENS", 1)
    model, merged = stock_model(tiny_checkpoint(name)), {site.name: h for site, h in tiny_sites(tiny_checkpoint(name))}
    sites, asked = [site for site, _ in tiny_sites(tiny_checkpoint(name))], list[Tensor]()
    sample = {"input_ids": tiny_tokens(2 * EVERY, 16)}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["input_ids"]) if module is model else None, with_kwargs=True
    )
    unknown = lambda: [row for ids in asked for row in ids if not (row == sample["input_ids"]).all(1).any()]  # noqa: E731
    heads = {site: h if number else with_noise(h) for number, (site, h) in enumerate(merged.items())}
    heard: list[int] = []
    distill(model, sites, lambda site: heads[site.name], sample, tokens=None, progress=heard.append)
    assert unknown() and sum(heard) == total_tokens(sample, None)
    asked.clear()
    distill(model, sites, lambda site: heads[site.name], sample, tokens=4 * sample["input_ids"].numel())
    assert asked and not unknown()


def with_noise(heads: distilling.Heads) -> distilling.Heads:
    from dataclasses import replace

    return replace(heads, v=heads.v + 0.1 * torch.randn(heads.v.shape, dtype=heads.v.dtype, generator=drawn()))


def test_their_tokens_count() -> None:
    sample = {"input_ids": tiny_tokens(2 * EVERY, 1024)}
    batches, trained, once = distilling._batches(sample, None)
    assert once and trained == sum(map(num_tokens, batches)) == (2 * EVERY + 2) * 1024
    part, trained, once = distilling._batches(sample, EVERY * 1024)  # one more is held back
    own = EVERY + 1
    assert once and len(part) == own + 1 and trained == round(EVERY * 1024 * (own + 1) / own)
    pairs = tiny_sample("t5", 2 * EVERY)
    assert len(distilling._batches(pairs, None)[0]) == len(list(distilling.batches_in_order(pairs, 1024)))
