"""Decoding over grouped heads: every way to compute attention gives the same, and caches that grow in place give what stock ones do."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_tight
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_tokens
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import headfold
from headfold.runtime import decoding, kernel
from headfold.runtime.attention import headfold_attention
from headfold.runtime.cache import GrowingCache, GrowingLayer, GrowingSlidingLayer, generate_in_place

UNEVEN = (0, 0, 0, 1, 0, 2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spelled_out(query: Tensor, key: Tensor, value: Tensor, kv_of_query: tuple[int, ...], mask: Tensor) -> Tensor:
    """One head at a time."""
    heads = []
    for head, kv in enumerate(kv_of_query):
        scores = query[:, head] @ key[:, kv].mT / query.shape[-1] ** 0.5
        heads.append(scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ value[:, kv])
    return torch.stack(heads, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, decoding.FEW, decoding.FEW + 1, 40])
@pytest.mark.parametrize("kv_of_query", [(0, 0, 0, 1, 1, 1), (0,) * 6, UNEVEN])
def test_attention_is_what_one_head_at_a_time_gives(kv_of_query: tuple[int, ...], tokens: int, padded: bool) -> None:
    module, groups = nn.Module(), max(kv_of_query) + 1
    module.kv_of_query = kv_of_query if kv_of_query == UNEVEN else None
    keys = 47 if padded or tokens == 1 else tokens  # without a mask, many queries are all there is
    query, key, value = drawn(2, 6, tokens, 8), drawn(2, groups, keys, 8, seed=1), drawn(2, groups, keys, 8, seed=2)
    mask = torch.ones(2, 1, tokens, keys, dtype=torch.bool).tril(keys - tokens)
    mask[1, ..., :3] &= not padded
    mask[..., -1] |= ~mask.any(-1)
    found, _ = headfold_attention(module, query, key, value, mask if padded else None)
    assert_tight(found, spelled_out(query, key, value, kv_of_query, mask))


@pytest.mark.parametrize("mask", [None, "boolean", "added"])
@pytest.mark.parametrize("name", ["sdpa", "matmuls"])
def test_candidates_agree(name: str, mask: str | None) -> None:
    query, key, value = drawn(2, 3, 4, 8), drawn(2, 3, 20, 8, seed=1), drawn(2, 3, 20, 8, seed=2)
    seen = torch.ones(2, 1, 4, 20, dtype=torch.bool).tril(16)
    given_mask = {None: None, "boolean": seen, "added": torch.where(seen, drawn(2, 1, 4, 20, seed=3), -1e30)}[mask]
    found, _ = decoding.CANDIDATES[name](None, query, key, value, given_mask, scaling=0.3)
    assert_tight(found, in_float64(query, key, value, given_mask))


def in_float64(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query.double() @ key.double().mT * 0.3
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float64).min)  # all alike where nothing may be seen
    elif mask is not None:
        scores = scores + mask.double()
    return (scores.softmax(-1) @ value.double()).transpose(1, 2)


needs_kernel = pytest.mark.skipif(not kernel.library()[0], reason=f"no decode kernel here: {kernel.library()[1]}")


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    rows=st.integers(1, 11),
    keys=st.one_of(st.integers(1, 5), st.integers(60, 70), st.integers(500, 1100)),
    pairs=st.integers(1, 5),
    mask=st.sampled_from(["none", "keys", "rows", "nothing", "bias", "bias of all heads"]),
    layout=st.sampled_from(["plain", "room", "by token"]),
    threads=st.integers(1, 3),
)
def test_the_kernel_is_exact(
    dtype: torch.dtype, batch: int, groups: int, rows: int, keys: int, pairs: int, mask: str, layout: str, threads: int
) -> None:
    dim = pairs * kernel.library()[0].headfold_width()
    query = (3 * drawn(batch, groups, rows, dim)).to(dtype)
    key, value = (laid_out(drawn(batch, groups, keys, dim, seed=s).to(dtype), layout) for s in (1, 2))
    given_mask = {
        "none": lambda: None,
        "keys": lambda: drawn(batch, 1, 1, keys) > 0,
        "rows": lambda: drawn(batch, groups, rows, keys) > 0,
        "nothing": lambda: torch.zeros(batch, 1, 1, keys, dtype=torch.bool),
        "bias": lambda: (5 * drawn(1, groups, rows, keys)).to(dtype),
        "bias of all heads": lambda: (5 * drawn(batch, 1, rows, keys)).to(dtype),
    }[mask]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, _ = kernel.kernel(None, query, key, value, given_mask, scaling=0.3)
    finally:
        torch.set_num_threads(before)
    exact = in_float64(query, key, value, given_mask)
    assert found.dtype == dtype and found.shape == exact.shape
    # Sums of positive weights and bounded values in float32, and one rounding to the dtype at the end.
    assert (found - exact).abs().max() <= (1e-5 + torch.finfo(dtype).eps / 2) * value.abs().max()


def laid_out(states: Tensor, layout: str) -> Tensor:
    """The same numbers as caches hold them: the beginning of a larger room, or tokens outside heads."""
    if layout == "room":
        return torch.cat([states, torch.full_like(states, torch.nan)], 2)[:, :, : states.shape[2]]
    return states.transpose(1, 2).contiguous().transpose(1, 2) if layout == "by token" else states


@needs_kernel
@pytest.mark.parametrize("change", ["columns apart", "other width of values", "gradients"])
def test_what_the_kernel_cannot_take_goes_to_the_fused_one(change: str) -> None:
    query, key, value = (drawn(1, 2, n, 32, seed=n).float() for n in (3, 40, 40))
    if change == "columns apart":
        key = key.mT.contiguous().mT
    elif change == "other width of values":
        value = value[..., :16]
    else:
        key.requires_grad_()
        assert decoding.choose(query, key, None) is decoding.sdpa
        return
    found, _ = kernel.kernel(None, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found.double(), in_float64(query, key, value, None), rtol=1e-5, atol=1e-5)


@needs_kernel
def test_the_kernel_refuses_what_no_call_of_it_takes() -> None:
    for query in (drawn(1, 2, 3, 32), drawn(1, 2, 3, 32).half(), drawn(1, 2, 3, 24).float()):
        with pytest.raises(decoding.Unsuited, match="float16|float64|heads of 24"):
            kernel.kernel(None, query, query, query, None)


@pytest.fixture
def fresh_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is built yet, and nothing of what happens here stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.library.cache_clear()
    yield monkeypatch
    kernel.library.cache_clear()
    decoding.fastest.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("CXX", "no-such-compiler", "no-such-compiler"), ("CXX", "false", "false failed"), ("HEADFOLD_KERNEL", "0", "HEADFOLD_KERNEL=0")],
)  # fmt: skip
def test_without_a_compiler_the_others_decode(
    fresh_kernel: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, reason: str
) -> None:
    fresh_kernel.setenv(name, value)
    decoding.fastest.cache_clear()
    assert kernel.library()[0] is None
    query, key = torch.randn(2, 2, 4, 32), torch.randn(2, 2, 100, 32)
    assert decoding.choose(query, key, None) in (decoding.sdpa, decoding.matmuls)
    assert reason in decoding.TRIALS[-1].unsuited["kernel"] and reason in str(decoding.TRIALS[-1])
    assert not list(tmp_path.rglob("*.so"))


@needs_kernel
def test_the_kernel_is_built_once(fresh_kernel: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kernel.library()[0]
    (built,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kernel.library.cache_clear()
    written = built.stat().st_mtime_ns
    assert kernel.library()[0] and built.stat().st_mtime_ns == written


def test_a_candidate_that_errs_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
        return decoding.sdpa(*arguments, **keywords)[0] * 1.2, None

    monkeypatch.setattr(decoding, "CANDIDATES", {"wrong": wrong, "sdpa": decoding.sdpa})
    decoding.fastest.cache_clear()
    assert decoding.choose(torch.randn(2, 2, 4, 8), torch.randn(2, 2, 100, 8), None) is decoding.sdpa
    assert "wrong" in decoding.TRIALS[-1].unsuited
    decoding.fastest.cache_clear()


def changed(layer: DynamicLayer, step: str, batch: int) -> None:
    if step == "crop":
        layer.crop(-1)
    elif step == "reorder":
        layer.reorder_cache(torch.tensor([0, *range(batch - 1)]))
    elif step == "repeat":
        layer.batch_repeat_interleave(2)
    else:
        layer.batch_select_indices(torch.tensor([batch - 1]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["add", "add many", "crop", "reorder", "repeat", "select", "reset"]), max_size=24),
    st.sampled_from(["free", "limited", "window of 1", "window of 5", "window of 90", "recording"]),
)
def test_a_growing_layer_holds_what_a_dynamic_one_does(steps: list[str], kind: str) -> None:
    if kind in ("free", "limited"):
        ours, stock = GrowingLayer(40 if kind == "limited" else None), DynamicLayer()
    else:
        window = int(kind.split()[-1]) if kind != "recording" else 5
        ours, stock = GrowingSlidingLayer(window), DynamicSlidingWindowLayer(window)
        for layer in (ours, stock) if kind == "recording" else ():
            layer.activate_past_recording()
    batch = 3
    for number, step in enumerate(steps):
        count = {"add": 1, "add many": 70}.get(step)
        full = stock.is_sliding and stock.get_seq_length() >= stock.sliding_window and not stock.record_past
        if count:
            new = [drawn(batch, 2, count, 4, seed=2 * number + i) for i in range(2)]
            for found, expected in zip(ours.update(*new), stock.update(*new), strict=True):
                assert_bitwise(found.contiguous(), expected)
        elif step == "reset":
            ours.reset(), stock.reset()
            batch = 3
        elif stock.get_seq_length() > 1 and not (step == "crop" and full):  # which stock refuses
            changed(ours, step, batch), changed(stock, step, batch)
            batch = {"repeat": 2 * batch, "select": 1}.get(step, batch)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(1) == stock.get_mask_sizes(1)


def test_a_window_is_copied_once_in_a_window() -> None:
    layer, room, rooms = GrowingSlidingLayer(100), None, 0
    for step in range(1000):
        keys, _ = layer.update(drawn(1, 2, 1, 4, seed=step), drawn(1, 2, 1, 4, seed=-step - 1))
        rooms += keys._base is not room
        room = keys._base
        assert room.shape[2] <= 200
    assert layer.keys.shape[2] == 99 and rooms <= 12


def test_new_tokens_are_written_where_the_old_ones_lie() -> None:
    layer, addresses = GrowingLayer(), []
    for step in range(200):
        layer.update(drawn(2, 2, 1, 4, seed=step), drawn(2, 2, 1, 4, seed=-step - 1))
        addresses.append(layer.keys.data_ptr())
    assert len(set(addresses)) <= 4, "64, 130 and 262 tokens of room are enough for 200"
    at = layer.keys.data_ptr()
    layer.crop(-10)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.update(drawn(2, 2, 1, 4), drawn(2, 2, 1, 4))
    assert layer.keys.data_ptr() == at and layer.keys.shape[2] == 191


def test_copies_do_not_share_room() -> None:
    layer = GrowingLayer()
    layer.update(drawn(1, 2, 5, 4), drawn(1, 2, 5, 4))
    other = copy.deepcopy(layer)
    layer.update(drawn(1, 2, 1, 4, seed=1), drawn(1, 2, 1, 4, seed=1))
    other.update(drawn(1, 2, 1, 4, seed=2), drawn(1, 2, 1, 4, seed=2))
    assert_bitwise(layer.keys[:, :, 5:].contiguous(), drawn(1, 2, 1, 4, seed=1))
    assert_bitwise(other.keys[:, :, 5:].contiguous(), drawn(1, 2, 1, 4, seed=2))


def test_gradients_flow_through_a_cache() -> None:
    layer = GrowingLayer()
    first, second = (drawn(1, 2, 3, 4, seed=s).requires_grad_() for s in (0, 1))
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    keys.square().sum().backward()
    assert first.grad is not None and second.grad is not None


@pytest.mark.parametrize(
    "how", [dict(), dict(num_beams=3), dict(do_sample=True, top_k=4)], ids=["greedy", "beams", "samples"]
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "t5", "bart", "gpt2"])
def test_generate_writes_what_it_writes_with_stock_caches(name: str, how: dict[str, Any]) -> None:
    model = stock_model(tiny_checkpoint(name))
    inputs = {key: tensor for key, tensor in tiny_sample(name, 3).items() if key != "labels"}
    if "attention_mask" not in inputs:  # padded on the left
        inputs = {"input_ids": tiny_tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
        inputs["attention_mask"][1, :4] = 0
    options = dict(max_new_tokens=14, min_new_tokens=14, pad_token_id=0, return_dict_in_generate=True, **how)
    torch.manual_seed(0)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(0)
    found = generate_in_place(model).generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    cache = getattr(found.past_key_values, "self_attention_cache", found.past_key_values)
    assert {type(layer) for layer in cache.layers} == {GrowingSlidingLayer if name == "mistral" else GrowingLayer}


def test_a_stock_model_takes_a_growing_cache() -> None:
    model = stock_model(tiny_checkpoint("llama"))
    tokens = tiny_tokens(2, 12)
    cache = GrowingCache(model.config)
    with torch.no_grad():
        parts = [model(tokens[:, at : at + 4], past_key_values=cache).logits for at in (0, 4, 8)]
        assert_tight(torch.cat(parts, 1), model(tokens).logits)
    assert cache.get_seq_length() == 12 and all(type(layer) is GrowingLayer for layer in cache.layers)


def test_a_fold_is_loaded_to_decode_fast(tmp_path: Path) -> None:
    headfold.fold(tiny_checkpoint("llama"), tmp_path / "out", kv_heads=2, merge="mean", group="contiguous", refit=False)
    model = headfold.load(tmp_path / "out")
    assert model.config._attn_implementation == "headfold"
    assert headfold.load(tmp_path / "out", attn_implementation="eager").config._attn_implementation == "eager"
    said = model.generate(tiny_tokens(2, 9), max_new_tokens=5, return_dict_in_generate=True, pad_token_id=0)
    assert {type(layer) for layer in said.past_key_values.layers} == {GrowingLayer}
    assert {layer.keys.shape[1] for layer in said.past_key_values.layers} == {2}
    torch.manual_seed(0)
    stock = stock_model(tmp_path / "out")
    assert torch.equal(said.sequences, stock.generate(tiny_tokens(2, 9), max_new_tokens=5, pad_token_id=0))
