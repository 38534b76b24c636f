"""Windows are given positions with gaps, and some copies, so that a fold is trained on longer distances than they have."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from grades import assert_tight_through_float32_norms
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY, stock_model, tiny_checkpoint, tiny_sites, tiny_tokens
from torch import Tensor

from headfold.conversion.source import open_source
from headfold.families.spec import Site
from headfold.refine import distill as distilling
from headfold.refine.distill import distill
from headfold.refine.spread import COPIED, COPIES_EVERY, SPANS, TIMES, num_positions, spread

WINDOW = 6


def rotary_sites(name: str) -> list[Site]:
    """Return the sites of a tiny checkpoint, which know what attention may span."""
    return open_source(str(tiny_checkpoint(name))).sites


ROTARY = sorted(
    name
    for name in TINY
    if all(site.key_freedom.rotary_dim and site.key_freedom.context > 8 for site in rotary_sites(name))
)


def windows(*counts: int, length: int = WINDOW) -> Iterator[dict[str, Tensor]]:
    return ({"input_ids": tiny_tokens(count, length)} for count in counts)


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 2**20))
def test_a_window_has_one_gap_and_ends_within_num_positions(length: int, more: int, seed: int) -> None:
    for batch in spread(windows(3, 1, length=length), length + more, seed):
        if not more:
            assert "position_ids" not in batch
            continue
        steps = batch["position_ids"].diff()
        assert (batch["position_ids"][:, 0] == 0).all() and (steps >= 1).all()
        assert ((steps > 1).sum(1) <= 1).all() and (batch["position_ids"] < length + more).all()


def test_gaps_differ_by_window_and_by_seed_and_reach_the_end() -> None:
    first, again, other = (torch.cat([b["position_ids"] for b in spread(windows(40, 40), 48, s)]) for s in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    lasts = first[:, -1]
    assert len(lasts.unique()) > 20 and lasts.min() < 12 and lasts.max() > 40
    assert len({int(row.diff().argmax()) for row in first}) == WINDOW - 1


@given(st.integers(2, 400), st.lists(st.integers(1, 5), max_size=6), st.integers(0, 2**20))
def test_one_window_in_so_many_ends_with_copies_of_spans_behind_its_gap(
    length: int, counts: list[int], seed: int
) -> None:
    given = torch.arange(sum(counts) * length).view(-1, length)  # every token tells where it was
    found = list(spread(({"input_ids": each} for each in given.split(counts)), length + 9, seed))
    assert given.equal(torch.arange(sum(counts) * length).view(-1, length))  # what was given is as before
    if not counts:
        return
    ids, positions = (torch.cat([each[name] for each in found]) for name in ("input_ids", "position_ids"))
    last = max(1, length // COPIED)
    for number, (row, whole, steps) in enumerate(zip(ids, given, positions.diff(), strict=True)):
        if number % COPIES_EVERY < COPIES_EVERY - 1:
            assert row.equal(whole)
            continue
        assert row[:-last].equal(whole[:-last]) and torch.isin(row[-last:], whole[:-last]).all()
        assert (steps[: -last] == 1).all() and (last == 1 or (steps[-last + 1 :] == 1).all())  # fmt: skip
        ends = [0, *(1 + (row[-last:].diff() != 1).nonzero()[:, 0]).tolist(), last]
        spans = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
        assert all(
            span >= min(SPANS[0], length - last) for span in spans[:-1]
        )  # two neighbours may go on from each other


@pytest.mark.parametrize("name", ROTARY)
def test_the_original_answers_as_if_unseen_tokens_filled_the_gap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask, stock models would take one window with a gap for two texts."""
    directory, asked = tiny_checkpoint(name), list[tuple[dict[str, Any], Tensor]]()
    model, merged = stock_model(directory), {site.name: heads for site, heads in tiny_sites(directory)}
    model.register_forward_hook(
        lambda module, args, kwargs, output: asked.append((kwargs, output.logits)) if module is model else None,
        with_kwargs=True,
    )
    monkeypatch.setattr(distilling, "ONCE_TOKENS", 1)
    sample = {"input_ids": tiny_tokens(4, WINDOW)}
    distill(model, rotary_sites(name), lambda site: merged[site.name], sample, tokens=None)
    model._forward_hooks.clear()
    gaps = 0
    for kwargs, logits in asked:
        positions = kwargs["position_ids"][0]
        size = int(positions[-1]) + 1
        gaps += size > WINDOW
        seen = torch.zeros(1, size, dtype=torch.long)
        seen[:, positions] = 1
        tokens = tiny_tokens(1, size, seed=1)
        tokens[:, positions] = kwargs["input_ids"]
        whole = model(input_ids=tokens, attention_mask=seen, position_ids=torch.arange(size)[None]).logits
        assert_tight_through_float32_norms(logits, whole[:, positions])
    assert gaps


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "mistral", "gemma2", "olmo3", "smollm3"])
def test_windows_stay_whole_where_attention_is_not_rotary_or_has_a_window(name: str) -> None:
    assert num_positions(stock_model(tiny_checkpoint(name)), rotary_sites(name), {"input_ids": tiny_tokens(2, 8)}) == 8


def test_positions_reach_the_context_and_no_more_than_was_measured() -> None:
    model, sites = stock_model(tiny_checkpoint("llama")), rotary_sites("llama")
    context = sites[0].key_freedom.context
    assert [num_positions(model, sites, {"input_ids": tiny_tokens(1, length)}) for length in (4, 32, context)] == [
        4 * TIMES, context, context,
    ]  # fmt: skip
    padded = {"input_ids": tiny_tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    assert num_positions(model, sites, padded) == 0
