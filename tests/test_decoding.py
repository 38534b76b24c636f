"""Decoding over grouped heads: every way to compute attention gives the same, and caches that grow in place give what stock ones do."""

import copy
import pickle
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
from headfold.runtime import decoding
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


def test_a_candidate_that_errs_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
        return decoding.sdpa(*arguments, **keywords)[0] * 1.2, None

    monkeypatch.setattr(decoding, "CANDIDATES", {"wrong": wrong, "sdpa": decoding.sdpa})
    decoding.fastest.cache_clear()
    assert decoding.choose(torch.randn(2, 2, 4, 8), *torch.randn(2, 2, 2, 100, 8), None) is decoding.sdpa
    assert "wrong" in decoding.TIMINGS[-1].unsuited
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
@torch.no_grad()
def test_a_growing_layer_holds_what_a_dynamic_one_does(steps: list[str], kind: str) -> None:
    if kind in ("free", "limited"):
        ours, stock = GrowingLayer(limit=40 if kind == "limited" else None), DynamicLayer()
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


@torch.no_grad()
def test_a_window_is_copied_once_in_a_window() -> None:
    layer, room, rooms = GrowingSlidingLayer(100), None, 0
    for step in range(1000):
        layer.update(drawn(1, 2, 1, 4, seed=step), drawn(1, 2, 1, 4, seed=-step - 1))
        rooms += layer._rooms[0] is not room
        room = layer._rooms[0]
        assert room.shape[2] <= 200
    assert layer.keys.shape[2] == 99 and rooms <= 12


@torch.no_grad()
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


@torch.no_grad()
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


def test_gradients_of_queries_flow_over_several_steps() -> None:
    """Keys and values without gradients are still needed by the backward pass of the queries."""
    layer, query, total = GrowingLayer(), drawn(1, 2, 1, 4).requires_grad_(), 0
    for step in range(3):
        keys, values = layer.update(drawn(1, 2, 1, 4, seed=step), drawn(1, 2, 1, 4, seed=step + 9))
        total = total + ((query @ keys.mT).softmax(-1) @ values).sum()
    total.backward()
    assert query.grad is not None


@pytest.mark.parametrize("which", ["query", "value", "mask"])
def test_gradients_are_never_lost_to_a_kernel(which: str) -> None:
    states = {
        "query": drawn(1, 2, 1, 32).float(),
        "key": drawn(1, 2, 40, 32).float(),
        "value": drawn(1, 2, 40, 32).float(),
    }
    states["mask"] = drawn(1, 2, 1, 40).float()
    states[which].requires_grad_()
    assert decoding.choose(*states.values()) is decoding.sdpa
    output, _ = headfold_attention(nn.Module(), *states.values())
    assert output.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caches_grow_in_place_in_either_mode(mode: Any) -> None:
    layer, rooms = GrowingLayer(), []
    with mode():
        for step in range(60):
            layer.update(drawn(1, 2, 1, 4, seed=step), drawn(1, 2, 1, 4, seed=step))
            rooms.append(layer._rooms[0])
    assert all(room is rooms[0] for room in rooms)


@torch.no_grad()
def test_a_limit_that_proved_too_low_costs_no_copies() -> None:
    layer, rooms = GrowingLayer(limit=10), set()
    for step in range(100):
        layer.update(drawn(1, 2, 1, 4, seed=step), drawn(1, 2, 1, 4, seed=step))
        rooms.add(layer._rooms[0].shape[2])
    assert rooms == {10, 64, 130}


def test_samples_are_those_of_stock_on_the_first_call_too() -> None:
    """Measuring candidates draws nothing from the generator that sampling draws from."""
    model = stock_model(tiny_checkpoint("llama"), torch.float32)
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=True, pad_token_id=0)
    said = []
    for attention in ("sdpa", "headfold"):
        model.set_attn_implementation(attention)
        decoding.fastest.cache_clear()
        torch.manual_seed(0)
        said.append(model.generate(tiny_tokens(2, 9), **options))
    assert torch.equal(*said)


def test_a_model_that_decodes_in_place_pickles() -> None:
    model = generate_in_place(stock_model(tiny_checkpoint("llama")))
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        cache = other.generate(tiny_tokens(1, 5), max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True)
        assert {type(layer) for layer in cache.past_key_values.layers} == {GrowingLayer}
        assert other._prepare_cache_for_generation.model is other


def test_a_model_with_windows_assists() -> None:
    target, assistant = (stock_model(tiny_checkpoint(name)) for name in ("llama", "mistral"))
    options = dict(max_new_tokens=14, do_sample=False, pad_token_id=0)
    expected = target.generate(tiny_tokens(1, 9), **options)
    said = target.generate(tiny_tokens(1, 9), assistant_model=generate_in_place(assistant), **options)
    assert torch.equal(said, expected)


def test_a_cache_goes_on_growing_in_another_call() -> None:
    model = generate_in_place(stock_model(tiny_checkpoint("llama")))
    options = dict(min_new_tokens=4, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True)
    first = model.generate(tiny_tokens(1, 9), **options)
    limit = first.past_key_values.layers[0].limit
    again = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
    assert again.past_key_values.layers[0].limit == limit + 4
    plain = model.generate(tiny_tokens(1, 9), min_new_tokens=8, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(again.sequences, plain)


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
