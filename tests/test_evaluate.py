"""Losses are what a plain loop computes, a model equals itself, and verification tells a correct fold from a wrong one."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import TINY, stock_logits, stock_model, tiny_checkpoint, tiny_tokens
from torch import Tensor

from headfold.core.errors import UserError
from headfold.evaluate import perplexity
from headfold.evaluate.perplexity import Evaluation, compare_models, evaluate_perplexity, split_windows
from headfold.evaluate.verify import compare_with_twin

REASSOCIATED = 2**10 * torch.finfo(torch.float64).eps
"""Sums of at most some thousand float64 terms in another order."""


def same(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=REASSOCIATED)


def windows_of(num_tokens: int, context: int) -> tuple[Tensor, ...]:
    return split_windows(tiny_tokens(1, num_tokens)[0], context)


def brute_force(
    path: Path, reference: Path, windows: tuple[Tensor, ...]
) -> list[tuple[int, float, float, float, bool]]:
    """(position, loss, reference loss, KL, agreement) of every predicted token, one window and one position at a time."""
    rows = []
    for window in windows:
        ours, theirs = (stock_logits(p, window[None])[0] for p in (path, reference))
        for at in range(len(window) - 1):
            q, p = (torch.exp(row[at]) / torch.exp(row[at]).sum() for row in (ours, theirs))
            kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
            target = window[at + 1]
            rows.append((at, -math.log(q[target]), -math.log(p[target]), kl, bool(q.argmax() == p.argmax())))
    return rows


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("chunk", [1, perplexity.CHUNK])
def test_losses_are_those_of_a_plain_loop(batch_size, chunk, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK", chunk)
    path, reference = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    windows = windows_of(75, 16)  # four full windows and one of 11
    rows = brute_force(path, reference, windows)
    found = compare_models(stock_model(path), stock_model(reference), windows, batch_size=batch_size, num_bins=5)
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert found.num_tokens == len(rows) == 4 * 15 + 10
    assert same(found.nll, mean[1]) and same(found.reference_nll, mean[2]) and same(found.perplexity, math.exp(mean[1]))
    assert same(found.kl, mean[3]) and found.kl > 0.1 and found.top1_agreement == mean[4] < 1
    for index, loss in enumerate(found.nll_by_position):
        binned = [row[1] for row in rows if row[0] // 3 == index]
        assert same(loss, sum(binned) / len(binned))


def test_a_model_beside_itself_has_no_divergence():
    path = tiny_checkpoint("llama")
    model, windows = stock_model(path), windows_of(64, 16)
    alone, beside = compare_models(model, None, windows), compare_models(model, stock_model(path), windows)
    assert beside.kl == 0 and beside.top1_agreement == 1 and beside.nll == beside.reference_nll == alone.nll
    assert alone.kl is alone.reference_nll is alone.top1_agreement is None


def test_windows_cover_the_text_in_order():
    tokens = torch.arange(50)
    assert torch.equal(torch.cat(split_windows(tokens, 16)), tokens)
    assert [len(window) for window in split_windows(tokens, 7)] == [7] * 7  # a last single token predicts nothing


@pytest.fixture
def readable(tmp_path, tokenizer) -> Path:  # noqa: F811
    """A float32 checkpoint with a tokenizer of bytes, grouped: 4 K/V heads of 8 over 2 layers."""
    path = tmp_path / "model"
    model = stock_model(tiny_checkpoint("llama-bias-gqa", torch.float32, vocab_size=257), torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_evaluate_reads_a_text_file_to_its_end(readable, tmp_path):
    (tmp_path / "text.txt").write_text("abc " * 42)
    result = evaluate_perplexity(readable, readable, str(tmp_path / "text.txt"), context=32)
    assert (result.num_windows, result.num_tokens) == (6, 5 * 31 + 8)  # 169 tokens with `<s>`, the last window short
    assert result.kl == 0 and result.text.endswith("text.txt") and result.dtype == "float32"
    assert result.kv_bytes_per_token == result.reference_kv_bytes_per_token == 2 * 2 * 4 * 8 * 4
    assert evaluate_perplexity(readable, None, str(tmp_path / "text.txt")).context == 64  # the model's own
    assert json.loads(json.dumps(dataclasses.asdict(result)))["nll"] == result.nll


def test_evaluate_counts_the_cache_of_a_multi_query_model(tmp_path, tokenizer):  # noqa: F811
    path = tmp_path / "model"
    model = stock_model(tiny_checkpoint("falcon-multi-query", torch.float32, vocab_size=257), torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (tmp_path / "text.txt").write_text("abc " * 42)
    assert evaluate_perplexity(path, None, str(tmp_path / "text.txt")).kv_bytes_per_token == 2 * 2 * 1 * 6 * 4


def test_evaluate_refuses_an_empty_text(readable, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="gives 1 tokens; need at least 2"):
        evaluate_perplexity(readable, None, str(tmp_path / "empty.txt"))


def test_evaluate_refuses_a_model_without_a_head(readable, tmp_path):
    config = json.loads((readable / "config.json").read_text())
    (readable / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(UserError, match="expected a language model, got LlamaModel"):
        evaluate_perplexity(readable, None, str(tmp_path / "text.txt"))


def test_evaluation_is_a_comparison_with_its_circumstances():
    names = {field.name for field in dataclasses.fields(Evaluation)}
    assert {"nll", "kl", "top1_agreement", "nll_by_position", "kv_bytes_per_token", "text", "seconds"} <= names


def twin_and_fold(
    name: str, dtype: torch.dtype, out: Path, swap: tuple[int, int] | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """A fold by hand to half the K/V heads: of every pair the first stays. Returns the source and what the twin should hold.

    With `swap`, two of the fold's heads of the last layer trade places: what verification must not let pass.
    """
    source = tiny_checkpoint(name, dtype)
    config, stored = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    num_kv_heads = config["num_key_value_heads"]
    expected = {}
    for key in [key for key in stored if ".k_proj." in key or ".v_proj." in key]:
        heads = stored[key].unflatten(0, (num_kv_heads, -1))[::2]
        expected[key] = heads.repeat_interleave(2, 0).flatten(0, 1)
        if swap is not None and "layers.1" in key:
            first, second = swap
            heads = heads.index_copy(0, torch.tensor([first, second]), heads[[second, first]])
        stored[key] = heads.flatten(0, 1).contiguous()
    out.mkdir()
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"num_key_value_heads": num_kv_heads // 2}))
    return source, expected


FOLDABLE = sorted(set(TINY) - {"phi3", "phi3-partial-gqa", "olmo2", "olmo3", "olmoe"})
"""Not those with fused projections or a norm over all K heads, which are folded by hand nowhere here."""


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_correct_fold_verifies(name, tmp_path):
    source, expected = twin_and_fold(name, torch.float64, tmp_path / "fold")
    result = compare_with_twin(source, tmp_path / "fold", expected, {"input_ids": tiny_tokens()})
    assert result.passed and result.where is None and result.num_tokens == 32
    assert result.max_abs_difference <= result.tolerance


@pytest.mark.parametrize("memory_limit", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swapped_heads_do_not_verify_and_their_layer_is_named(dtype, memory_limit, tmp_path):
    source, expected = twin_and_fold("llama", dtype, tmp_path / "right")
    _, _ = twin_and_fold("llama", dtype, tmp_path / "wrong", swap=(0, 2))
    right, wrong = (
        compare_with_twin(source, tmp_path / name, expected, {"input_ids": tiny_tokens()}, memory_limit=memory_limit)
        for name in ("right", "wrong")
    )
    assert right.passed and right.dtype == ("float64" if dtype == torch.float64 else "float32")
    assert not wrong.passed and wrong.where == "layers.1" and wrong.max_abs_difference > wrong.tolerance


def test_not_a_number_does_not_verify(tmp_path):
    source, expected = twin_and_fold("llama", torch.float32, tmp_path / "fold")
    path = tmp_path / "fold" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.0.self_attn.v_proj.weight"][3, 3] = torch.nan
    save_file(stored, path, metadata={"format": "pt"})
    result = compare_with_twin(source, tmp_path / "fold", expected, {"input_ids": tiny_tokens()})
    assert not result.passed and result.where == "layers.0"
