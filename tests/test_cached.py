"""The K/V bytes that are counted from a checkpoint's files are those of the cache that its running model returns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_models import EVEN, ONE, SHUFFLED, THREE, UNEVEN, grouped
from test_head_dim_multiples import folded
from tiny import FOREIGN, TINY, stock_model, tiny_checkpoint, tiny_sample, tiny_tokens
from transformers.cache_utils import EncoderDecoderCache

import headfold
from headfold.checkpoint.reader import Checkpoint
from headfold.conversion.source import open_source
from headfold.core.groups import Groups
from headfold.core.plan import Plan
from headfold.families.cached import stored_kv_bytes_per_token
from headfold.verbs.export import export

GENERATE = sorted(TINY) + [name for name, tiny in FOREIGN.items() if tiny.kind in ("text", "pairs", "audio", "speech")]
ITEMSIZE = torch.float64.itemsize
LENGTH = 4
"""Tokens of an input: fewer than any sliding window."""


def counted(directory: Path) -> int:
    checkpoint = Checkpoint.open(directory)
    return stored_kv_bytes_per_token(checkpoint.config, checkpoint.tensors, ITEMSIZE)


@torch.no_grad()
def cached(model: Any, name: str) -> int:
    """The bytes of one token in the cache of a forward pass: of one of the decoder's and, for cross-attention, one of the encoder's."""
    sample = {"input_ids": tiny_tokens(1, LENGTH)}
    if name in FOREIGN and FOREIGN[name].kind in ("audio", "speech"):
        sound = "input_features" if FOREIGN[name].kind == "audio" else "input_values"
        sample = {sound: tiny_sample(name, 1)[sound].to(model.dtype)}
    if model.config.is_encoder_decoder:
        sample["decoder_input_ids"] = tiny_tokens(1, LENGTH)
    found = model(**sample, use_cache=True).past_key_values
    parts = (
        [found.self_attention_cache, found.cross_attention_cache] if isinstance(found, EncoderDecoderCache) else [found]
    )
    states = [states for part in parts for layer in part.layers for states in (layer.keys, layer.values)]
    assert states and len(states[0]) == 1
    return sum(one.nbytes // one.shape[2] for one in states)


@pytest.mark.parametrize("name", sorted(set(GENERATE) - {"falcon-new"}))
def test_an_original(name: str) -> None:
    directory = tiny_checkpoint(name)
    assert open_source(directory).kv_bytes_per_token() == counted(directory) == cached(stock_model(directory), name)


def test_falcon_caches_more_than_its_heads() -> None:
    """The new decoder of Falcon repeats its K/V heads before transformers caches them; the count is of the heads that it has."""
    directory = tiny_checkpoint("falcon-new")
    source = open_source(directory)
    assert source.kv_bytes_per_token() == counted(directory) == 2 * 2 * 4 * 6 * ITEMSIZE
    assert cached(stock_model(directory), "falcon-new") == 2 * counted(directory)


def test_multi_query_has_one_head() -> None:
    assert counted(tiny_checkpoint("falcon-multi-query")) == 2 * 2 * 1 * 6 * ITEMSIZE


def uneven(plan: Plan, directory: Path) -> Plan:
    """All heads but the last share one, at every other site all; where the order of heads is free."""
    sites = {site.name: site for site in open_source(directory).sites}
    rows = {}
    for number, (name, row) in enumerate(plan.sites.items()):
        count = sites[name].num_kv_heads
        alone = number % 2 == 0 or sites[name].query_order == "stack"
        rows[name] = replace(row, groups=Groups((*(0,) * (count - 1), int(alone))))
    return replace(plan, sites=rows)


FOLDED = (
    "llama", "qwen3", "phi3", "gpt2", "gpt_neox", "falcon-rotary", "falcon-new", "mpt", "opt", "t5", "mt5", "umt5", "bart", "whisper",
)  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("kinds", ["one count", "several counts"])
def test_a_fold(name: str, kinds: str, tmp_path: Path) -> None:
    """In the source's own class, headfold's form or the layout that fold chooses, self-attention and cross-attention."""
    directory = tiny_checkpoint(name)
    headfold.plan(directory, tmp_path / "plan.json", kv_heads=2, group="contiguous", merge="mean")
    if kinds == "several counts" and name != "phi3":  # whose q, k and v are one tensor, with one count for all layers
        made = uneven(Plan.load(tmp_path / "plan.json"), directory)
        (tmp_path / "plan.json").write_text(json.dumps(made.to_json()))
    result = headfold.fold(directory, tmp_path / "out", plan=tmp_path / "plan.json", refit=False, verify=False)
    running = headfold.load(tmp_path / "out")
    assert result.kv_bytes_after == counted(tmp_path / "out") == cached(running, name) < counted(directory)


def test_an_encoder_that_is_folded_too(tmp_path: Path) -> None:
    """It is listed in the config of the fold, and caches nothing."""
    directory = tiny_checkpoint("bart")
    result = headfold.fold(
        directory, tmp_path / "out", kv_heads=2, encoder=True, group="contiguous", merge="mean", refit=False, verify=False
    )  # fmt: skip
    assert result.kv_bytes_after == counted(tmp_path / "out") == cached(headfold.load(tmp_path / "out"), "bart")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_a_larger_head_dim(name: str, tmp_path: Path) -> None:
    """In a stock class, and in slots."""
    result = folded(name, tmp_path / "out", kv_heads="1/2", verify=False)
    assert result.kv_bytes_after == counted(tmp_path / "out") == cached(headfold.load(tmp_path / "out"), name)


@pytest.mark.parametrize(
    ("name", "layout", "groups"),
    [
        ("llama", "native", [SHUFFLED, EVEN]),
        ("gptj", "native", [EVEN, EVEN]),
        ("llama", "padded", [UNEVEN, UNEVEN]),
        ("gpt_neox", "padded", [UNEVEN, UNEVEN]),
        ("llama", "per-layer", [EVEN, THREE]),
        ("llama", "per-layer", [UNEVEN, ONE]),
        ("llama", "decilm", [EVEN, ONE]),
    ],
)
def test_every_layout(name: str, layout: str, groups: list[tuple[int, ...]], tmp_path: Path) -> None:
    grouped(name, groups, tmp_path / "folded")
    export(tmp_path / "folded", tmp_path / "out", layout=layout, verify=False)
    for place in ("folded", "out"):
        assert counted(tmp_path / place) == cached(headfold.load(tmp_path / place), name)
    assert counted(tmp_path / "folded") == counted(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(model_type="unheard of", n_layer=3, n_head=4, n_embd=20), 3 * 2 * 4 * 5),
        (dict(model_type="unheard of", n_layer=3, n_head=4, n_embd=20, n_head_kv=2), 3 * 2 * 2 * 5),
        (dict(model_type="unheard of", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=7), 3 * 2 * 2 * 7),
        (dict(model_type="a wrapper", text_config=dict(num_hidden_layers=1, num_attention_heads=4, hidden_size=20)), 2 * 4 * 5),
        (dict(model_type="detected", headfold={"sites": [dict(module=m, kv_heads=n, head_dim=5) for m, n in [("a", 2), ("b", 1)]]}), 30),
    ],
)  # fmt: skip
def test_an_architecture_without_a_literal(config: dict[str, Any], expected: int) -> None:
    assert stored_kv_bytes_per_token(config, {}, 1) == expected


def test_the_cache_of_a_whole_context_has_the_positions_of_a_whisper_once() -> None:
    whisper, t5, llama = (open_source(tiny_checkpoint(name)) for name in ("whisper", "t5", "llama"))
    cross, own = ([site for site in whisper.cached_sites if site.reads_encoder is reads] for reads in (True, False))
    config = whisper.config
    expected = sum(
        2 * site.num_kv_heads * site.head_dim * ITEMSIZE * tokens
        for sites, tokens in ((cross, config["max_source_positions"]), (own, config["max_target_positions"]))
        for site in sites
    )
    assert cross and own and whisper.cache_bytes() == expected
    assert t5.cache_bytes() == 32_768 * t5.kv_bytes_per_token()
    assert llama.cache_bytes() == llama.config["max_position_embeddings"] * llama.kv_bytes_per_token()
