"""Advice before a fold agrees with figures computed by hand, with what a fold then caches, and with what a decoding step reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

import headfold
from headfold import cli
from headfold.advice import advise as advising
from headfold.advice import devices
from headfold.advice.advise import advise, workload
from headfold.advice.demand import demands
from headfold.advice.devices import GIB, GPUS, Device
from headfold.checkpoint.headers import TensorInfo
from headfold.checkpoint.reader import Checkpoint
from headfold.conversion.source import Source, open_source
from headfold.core.errors import UserError
from headfold.core.sizes import parse_size
from headfold.families import family_of
from headfold.families.spec import sites
from headfold.planning import make_plan
from headfold.sources.plain import Plain

SEVEN = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000, max_position_embeddings=4096
)  # fmt: skip


def unwritten(model_class: Any, config: Any) -> Source:
    """The source that a model of a config would be, in bfloat16, without its weights."""
    with torch.device("meta"):
        state = model_class(config).state_dict()
    tensors, at = {}, 0
    for name, tensor in state.items():
        tensors[name] = TensorInfo(
            torch.bfloat16, tuple(tensor.shape), "model.safetensors", at, at + 2 * tensor.numel()
        )
        at += 2 * tensor.numel()
    fields = config.to_dict() | {"architectures": [model_class.__name__]}
    checkpoint = Checkpoint(Path("my-model"), fields, tensors, ("model.safetensors",), {}, None)
    family, place = family_of(fields, "my-model"), Path("my-model")
    return Source("my-model", Plain(place, place), checkpoint, fields, family, sites(family, fields, tensors))


@pytest.fixture(scope="module")
def seven() -> Source:
    """Llama-2-7B: 6,738,415,616 parameters, 32 layers of 32 heads of 128."""
    return unwritten(LlamaForCausalLM, LlamaConfig(**SEVEN))


def test_a_llama_of_7b_by_hand(seven: Source) -> None:
    """2 x 32 layers x 32 heads x 128 dims x 2 bytes are 512 KiB per token; a step reads all weights but the embedding."""
    found = advise(seven, workload(seven, 4096, 16, None, "a100-80gb"))
    now, half, one = (next(o for o in found.options if o.num_kv_heads == n) for n in (32, 16, 1))
    assert [option.num_kv_heads for option in found.options] == [32, 16, 8, 4, 2, 1]
    assert (
        now.cache_bytes == 16 * 4096 * 512 * 1024 == 32 * GIB
        and half.cache_bytes == 16 * GIB
        and one.cache_bytes == GIB
    )
    parameters, embedding, saved = 6_738_415_616, 32000 * 4096, 2 * 32 * 4096 * 2048
    assert now.weight_bytes == 2 * parameters and half.weight_bytes == 2 * (parameters - saved)
    weights, cache = 2 * (parameters - embedding) / 2.039e12, 32 * GIB / 2.039e12
    assert now.step_seconds == pytest.approx(weights + cache) and now.cache_share == pytest.approx(
        cache / (weights + cache)
    )
    free = 0.9 * 80 * GIB - 2 * parameters
    assert now.fits and now.largest_batch == int(free // (2 * GIB)) == 29
    assert now.longest_context == 4096 == found.own_context  # 7,649 tokens would fit
    assert found.pays and found.command == "headfold fold my-model my-model-gqa --kv-heads 16"
    assert "the cache is 72% of a decoding step" in found.reason
    adapted = replace(seven, plain=replace(seven.plain, adapter="my adapter"))
    command = advise(adapted, workload(seven, 4096, 16, None, "a100-80gb")).command
    assert command == f"{found.command} --adapter 'my adapter'"


def test_what_does_not_fit_gets_the_mildest_fold_that_does(seven: Source) -> None:
    """24 GiB: 21.6 are usable, 12.55 are weights; 9.05 GiB are 18,532 tokens of 512 KiB, over 8 sequences 2,316."""
    found = advise(seven, workload(seven, 4096, 8, "24GiB", "4090"))
    now, *folds = found.options
    assert not now.fits and now.longest_context == int((0.9 * 24 * GIB - now.weight_bytes) // (8 * 512 * 1024)) == 2316
    assert [option.fits for option in folds] == [True] * 5 and folds[0].cache_bytes == 8 * GIB
    assert found.pays and "4,096 tokens x 8 does not fit now, and fits with 16 K/V heads" in found.reason
    least = advise(seven, workload(seven, 4096, 2048, "24GiB", "4090"))
    assert not least.pays and least.command is None and "folding is not enough" in least.reason
    small = advise(seven, workload(seven, 4096, 1, "8GiB", "4090"))
    assert not small.pays and "the weights alone are larger" in small.reason
    assert small.options[0].longest_context == small.options[0].largest_batch == 0


def test_a_short_context_does_not_pay(seven: Source) -> None:
    """31/32 of the cache are a tenth of a step where it is 1.52 GB beside 13.2 GB of weights: at 2,898 tokens of 512 KiB."""
    found = advise(seven, workload(seven, 128, 1, None, "h100"))
    assert not found.pays and found.command is None
    assert found.reason.startswith("folding does not pay here: reading the cache is 1% of a decoding step")
    assert found.reason.endswith("it pays from about 2,900 tokens on at this batch")
    for context, pays in ((2880, False), (2920, True)):
        assert advise(seven, workload(seven, context, 1, None, "h100")).pays == pays
    few = advise(seven, workload(seven, 32, 1, None, "h100")).reason
    many = int(
        advise(seven, workload(seven, 1024, 1, None, "4090"))
        .reason.partition("from about ")[2]
        .split()[0]
        .replace(",", "")
    )
    assert "from about 2,900 tokens" in few and many == 2900


def test_products_bound_a_large_batch(seven: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where arithmetic takes longer than reading the weights, a shorter read of them is not counted as a gain."""
    slow = Device("slow", 80 * GIB, 1e12, 1e12, "for the test")
    monkeypatch.setattr(advising, "gpu_named", lambda name: slow)
    found = advise(seven, workload(seven, 1, 100, None, "slow"))
    operations = 2 * (6_738_415_616 - 32000 * 4096)
    cache = 100 * 512 * 1024 / 1e12
    assert found.options[0].operations_per_token == operations
    assert found.options[0].step_seconds == pytest.approx(100 * operations / 1e12 + cache)


def test_sliding_layers_keep_their_window() -> None:
    config = MistralConfig(num_hidden_layers=4, sliding_window=1024, num_key_value_heads=32)
    first, *_ = demands(unwritten(MistralForCausalLM, config))
    per_token = 4 * 2 * 32 * 128 * 2
    assert first.cache_bytes(1000) == 1000 * per_token and first.cache_bytes(9000) == 1024 * per_token
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    first, *_ = demands(unwritten(MistralForCausalLM, config))
    assert first.cache_bytes(9000) == (1024 + 9000) * per_token // 2


def test_experts_that_no_token_chooses_are_not_read() -> None:
    """Two of four experts a token: half are read for one sequence, 15/16 for four that choose independently."""
    source = open_source(tiny_checkpoint("mixtral", torch.float32))
    first, *_ = demands(source)
    stored = {name: info.end - info.start for name, info in source.checkpoint.tensors.items()}
    experts = sum(size for name, size in stored.items() if ".experts." in name)
    assert first.expert_bytes == experts > 0 and first.weight_bytes == sum(stored.values())
    assert first.read_bytes(1) == first.dense_bytes + experts / 2
    assert first.read_bytes(4) == first.dense_bytes + experts * 15 / 16
    embedding = stored["model.embed_tokens.weight"]
    assert first.dense_bytes == sum(stored.values()) - experts - embedding


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "gpt2", "phi3", "gemma3_text"])
def test_demands_are_those_of_the_folds(name: str, tmp_path: Path) -> None:
    """Weights of the written fold, and bytes per token as a plan counts them."""
    source = open_source(tiny_checkpoint(name, torch.float32))
    for demand in demands(source):
        count = demand.num_kv_heads
        plan = make_plan(source.sites, source.checkpoint.read, count, source="", group="contiguous", merge="mean")
        assert sum(block.bytes_per_token for block in demand.blocks) == source.kv_bytes_per_token(plan)
        if count == 2:
            how: dict[str, Any] = dict(merge="mean", group="contiguous", refit=False, verify=False)
            headfold.fold(source.checkpoint.path, tmp_path / "out", kv_heads=2, **how)
            assert demand.weight_bytes == Checkpoint.open(tmp_path / "out").num_bytes


def test_an_encoder_decoder_counts_its_cross_attention() -> None:
    """A Whisper's has an entry for each of the encoder's positions, whatever the length of the text; no step reads its encoder."""
    source = open_source(tiny_checkpoint("whisper", torch.float32))
    first, *_ = demands(source)
    layers, heads = source.checkpoint.config["decoder_layers"], source.checkpoint.config["decoder_attention_heads"]
    per_token = layers * 2 * heads * source.sites[0].head_dim * 4
    assert first.cache_bytes(7) == per_token * (7 + 11) and first.encoder_tokens == 11
    read = {n for n in source.checkpoint.tensors if not n.startswith("model.encoder.layers.")}
    read -= {n for n in read if ".encoder_attn.k_proj" in n or ".encoder_attn.v_proj" in n}
    sizes = {n: source.checkpoint.tensors[n].end - source.checkpoint.tensors[n].start for n in read}
    assert first.dense_bytes == sum(sizes.values())  # its embedding is its output layer, too
    found = advise(source, workload(source, None, 2, None, "l4"))
    assert found.context == 32 and found.encoder_tokens == 11
    assert found.command is None or found.command.endswith("--calibration SOURCE")
    pair, *_ = demands(open_source(tiny_checkpoint("t5", torch.float32)))
    assert pair.cache_bytes(7) == 7 * sum(block.bytes_per_token for block in pair.blocks)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_an_encoder_saves_weights_alone(name: str) -> None:
    source = open_source(tiny_checkpoint(name, torch.float32))
    found = advise(source, workload(source, None, None, None, "l4"))
    assert not found.caches and "caches nothing" in found.reason and found.options[0].cache_bytes == 0
    assert found.options[0].step_seconds is None and found.options[-1].weight_bytes < found.options[0].weight_bytes
    assert found.options[-1].operations_per_token < found.options[0].operations_per_token


def test_this_machine_is_measured(seven: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_memory", lambda place: 64 * GIB)
    monkeypatch.setattr(devices, "read_bandwidth", lambda place: 3e10)
    monkeypatch.setattr(devices, "product_rate", lambda size, place, dtype: 5e11)
    found = advise(seven, workload(seven, 4096, 1, None, None))
    assert (found.memory, found.bandwidth, found.rate, found.source) == (64 * GIB, 3e10, 5e11, "measured now")
    assert workload(seven, 4096, 1, "2GB", None).usable == 1.8e9
    monkeypatch.setattr(devices, "available_memory", lambda place: GIB)
    with pytest.raises(UserError, match="2 GiB of free memory to measure .* got 1.0 GiB; name a device with --gpu"):
        workload(seven, 4096, 1, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpu l4 --context 8192", "--context 8192: the model's own context is 64; choose at most that"),
        ("--gpu l4 --context 0", "--context 0: expected a number from 1 on"),
        ("--gpu l4 --batch 0", "--batch 0: expected a number from 1 on"),
        ("--gpu l4 --memory much", "--memory much: expected a size with its unit, such as 24GiB"),
        ("--gpu voodoo2", "--gpu voodoo2: expected one of t4, a10, "),
    ],
)
def test_bad_workloads(options: str, message: str) -> None:
    model = str(tiny_checkpoint("llama", torch.float32))
    ran = CliRunner().invoke(cli.app, ["inspect", model, *options.split()])
    assert isinstance(ran.exception, UserError) and str(ran.exception).startswith(message)


def test_the_command_line_says_all_of_it(tmp_path: Path) -> None:
    model = str(tiny_checkpoint("llama", torch.float32))
    words = ["inspect", model, "--context", "64", "--batch", "1000000", "--memory", "1GiB", "--gpu", "RTX-4090"]
    ran = CliRunner().invoke(cli.app, [*words, "--json"])
    advice = json.loads(ran.stdout)["advice"]
    assert advice["device"] == "4090" and advice["memory"] == GIB and advice["context"] == 64
    assert [option["num_kv_heads"] for option in advice["options"]] == [8, 4, 2, 1]
    shown = CliRunner().invoke(cli.app, words).stdout
    assert "8 (now)" in shown and advice["reason"] in shown and "64 tokens x 1,000,000, on 4090 (1 GiB" in shown
    assert json.loads(CliRunner().invoke(cli.app, ["inspect", model, "--json"]).stdout)["advice"] is None


@pytest.mark.parametrize(("text", "size"), [("40KiB", 40960), ("65536", 65536), ("1.5 kB", 1500), ("2MiB", 2 << 20)])
def test_sizes(text: str, size: float) -> None:
    assert parse_size("--kv-bytes", text, "bytes") == size


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "4 apples", "1.2.3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--kv-bytes .*: expected bytes"):
        parse_size("--kv-bytes", text, "bytes")


def test_help_lists_the_gpus() -> None:
    text = CliRunner().invoke(cli.app, ["inspect", "--help"], env={"COLUMNS": "400"}).stdout
    assert all(f"{name}" in text for name in GPUS) and all(device.source for device in GPUS.values())
