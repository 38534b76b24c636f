"""Refitting W_q brings every query's attention nearer to the original's, in every family whose queries are linear."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from grades import assert_bitwise, assert_differs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_refit import site_calls
from tiny import DISTINCT, TINY, stock_model, tiny_checkpoint, tiny_sample, tiny_sites
from torch import Tensor

from headfold.core.heads import Heads
from headfold.families.spec import Site
from headfold.refine import queries
from headfold.refine.queries import refit_queries
from headfold.refine.recorded import AttentionInputs, RecordedSite
from headfold.refine.refit import QUERY_STEPS, RIDGE

NAMES = [*TINY, *DISTINCT]


def attention(seen: AttentionInputs) -> Tensor:
    """The weights by the textbook."""
    key = seen.key.repeat_interleave(seen.query.shape[1] // seen.key.shape[1], 1)
    logits = seen.scaling * seen.query.double() @ key.double().mT
    if seen.causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).bool().triu(1), -torch.inf)
    elif seen.mask is not None and seen.mask.dtype == torch.bool:
        logits = logits.masked_fill(~seen.mask, torch.finfo(torch.float64).min)
    elif seen.mask is not None:
        logits = logits + seen.mask
    return logits.softmax(-1)


@torch.no_grad()
def divergence(calls: RecordedSite, heads: Heads) -> Tensor:
    """KL of the attention with these heads to the original's, by head, over all queries that are not padding."""
    mine, theirs = calls.attention_inputs(heads, 0), calls.attention_inputs(None, 0)
    original = attention(theirs)[:, calls.order]
    kl = torch.special.xlogy(original, original) - torch.special.xlogy(original, attention(mine).clamp_min(1e-300))
    kl = kl.sum(-1) if mine.counted is None else kl.sum(-1) * mine.counted[:, None]
    return kl.sum((0, 2))


def spoilt(site: Site, heads: Heads, by: float = 0.25) -> Heads:
    noise = torch.randn(heads.q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise[..., -1] *= bool({"q", "qkv"} & set(site.biases))
    return dataclasses.replace(heads, q=heads.q + by * noise * heads.q.std())


def case(name: str, items: int = 12) -> tuple[RecordedSite, Site, Heads]:
    directory: Path = tiny_checkpoint(name)
    sample: Mapping[str, Tensor] = tiny_sample(name, items)
    site, heads = tiny_sites(directory)[-1]
    return site_calls(directory, site, sample), site, heads


@pytest.mark.parametrize("name", NAMES)
def test_spoilt_queries_are_found_again(name: str) -> None:
    """Under norms too, and no other field changes; None is returned where the attention is not asked for."""
    calls, site, heads = case(name)
    wrong = spoilt(site, heads)
    found = refit_queries(calls, wrong, RIDGE, QUERY_STEPS)
    assert (found is None) == (not calls.catches_attention)
    if found is not None:
        before, after = divergence(calls, wrong), divergence(calls, found)
        assert after.sum() < 0.6 * before.sum(), (before, after)
        for field in ("k", "v", "o"):
            assert_bitwise(getattr(found, field), getattr(heads, field))
        if not {"q", "qkv"} & set(site.biases):
            assert_bitwise(found.q[..., -1], wrong.q[..., -1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "whisper", "t5", "phi", "qwen3", "olmo2"])
def test_right_queries_stay(name: str) -> None:
    calls, _, heads = case(name)
    found = refit_queries(calls, heads, RIDGE, QUERY_STEPS)
    assert found is not None and divergence(calls, found).max() < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@settings(max_examples=5)
@given(by=st.floats(0.05, 3.0))
def test_no_head_gets_worse(name: str, by: float) -> None:
    """On the queries that are left to the search, of which all are seen here."""
    calls, site, heads = case(name)
    wrong = spoilt(site, heads, by)
    found = refit_queries(calls, wrong, RIDGE, QUERY_STEPS)
    assert found is not None
    rows = (
        torch.arange(calls.attention_inputs(None, 0).query.shape[2]) % queries._SEARCHED_EVERY
        == queries._SEARCHED_EVERY - 1
    )

    def by_head(heads: Heads) -> Tensor:
        mine, theirs = calls.attention_inputs(heads, 0), calls.attention_inputs(None, 0)
        p, q = attention(theirs)[:, calls.order], attention(mine)
        return -torch.special.xlogy(p, q.clamp_min(1e-300)).sum(-1)[..., rows].sum((0, 2))

    assert (by_head(found) <= by_head(wrong) * (1 + 1e-6)).all()
    assert_differs(found.q, wrong.q)


@pytest.mark.parametrize("num_calls", [1, 40, 400])
def test_as_many_queries_are_seen_as_asked_for(num_calls: int) -> None:
    """However short the calls are; every kind of sample is drawn from all positions that it may see."""
    one, site, heads = case("bert")
    module = stock_model(tiny_checkpoint("bert")).get_submodule(site.module)
    calls = RecordedSite(module, site, [one._recorded[0]] * num_calls, range(site.num_heads), fixes_attention=True)
    total, size = num_calls * one.num_queries(0), heads.q.shape[2]
    samples = queries._samples(calls, heads, size)
    seen = [sum(at.inputs.shape[0] * at.inputs.shape[1] for at in kind) for kind in samples]
    wanted = (max(min(2**14, max(2**12, total // 4)), 32 * size), max(2**12, 16 * size), 2**11)
    for found, asked, part in zip(seen, wanted, (7 / 8, 7 / 8, 1 / 8), strict=True):
        expected = min(asked, part * total)
        assert 0.5 * expected <= found <= 2 * expected, (seen, wanted, total)


@given(
    length=st.integers(0, 4096),
    offset=st.floats(0, 1, exclude_max=True),
    every=st.one_of(st.just(1.0), st.floats(1, 64)),
)
def test_rows_lie_inside_however_they_round(length: int, offset: float, every: float) -> None:
    rows = queries._evenly(length, offset * every, every)
    assert max(0, math.ceil((length - offset * every) / every)) - rows.numel() in (0, 1)
    assert ((rows >= 0) & (rows < length)).all() and (rows.diff() > 0).all()


def test_an_offset_near_one_chooses_no_row_past_the_last() -> None:
    """In float32 182 rows from 0.9999999 on end at row 182."""
    for first in (1 - 1e-7, 1 - 2**-53):
        assert queries._evenly(182, first, 1.0).max() < 182
