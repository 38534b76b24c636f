"""Timing: what is counted is what is there, what is watched is let go, and what cannot be timed is refused before it is begun."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run  # noqa: F401 - a fixture
from tiny import stock_model, tiny_checkpoint, tiny_sample
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headfold
from headfold.core.errors import UserError
from headfold.reports import timings
from headfold.runtime.cache import GrowingLayer
from headfold.timing import breakdown, generation, machine, shapes
from headfold.timing.generation import Setting
from headfold.verbs.bench import bench

SMALL = dict(contexts=(12,), batches=(2,), new_tokens=4, rounds=2)


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "folded"
    headfold.fold(
        tiny_checkpoint("llama", torch.float32), out, kv_heads=2, merge="mean", group="contiguous", refit=False
    )
    return out


def test_rows_say_what_a_cache_holds(folded: Path) -> None:
    original = tiny_checkpoint("llama", torch.float32)
    found = bench([original, folded], **SMALL)
    assert [(row.num_kv_heads, row.attention) for row in found.rows] == [
        ((heads,), name) for heads in (8, 2) for name in ("headfold", "sdpa")
    ]
    for row in found.rows:
        # Two layers, K and V, two samples, heads of 8, float32; the last token is never written.
        assert row.kv_bytes == 2 * 2 * 2 * row.num_kv_heads[0] * 8 * 4 * (12 + 4 - 1)
        assert 0 < row.per_token_quartiles[0] <= row.per_token <= row.per_token_quartiles[1]
        assert row.tokens_per_second == pytest.approx(2 / row.per_token)
        assert row.per_sample * 2 > row.first_token > 0
        assert row.bytes_per_second == pytest.approx((row.kv_bytes + row.weight_bytes) / row.per_token)
        assert row.parts is None
    assert found.read_bandwidth > 1e8 and found.dtype == "float32"


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5", "bart", "gpt2", "mistral"])
def test_a_filled_cache_is_as_large_as_a_read_one(name: str, grows: bool) -> None:
    model = stock_model(tiny_checkpoint(name))
    read = generation.generate(model, Setting(14, 2, 5), grows=grows)
    filled = generation.generate(model, Setting(14, 2, 5, skip_prefill=True), grows=grows)
    assert filled.kv_bytes == read.kv_bytes > 0 and filled.num_kv_heads == read.num_kv_heads
    assert len(filled.tokens) == len(read.tokens) == 4


def test_the_bytes_of_a_cache_are_known_before() -> None:
    for name in ("llama", "t5"):
        model = stock_model(tiny_checkpoint(name))
        setting = Setting(14, 2, 5)
        assert 0 <= generation.cache_bytes(model, setting) - generation.generate(model, setting, grows=False).kv_bytes
        assert generation.cache_bytes(model, setting) < 1.2 * generation.generate(model, setting, grows=False).kv_bytes


def test_padding_is_on_the_left_of_half() -> None:
    inputs = generation._inputs(stock_model(tiny_checkpoint("llama")), Setting(16, 4, 2, padded=True))
    assert inputs["attention_mask"].sum(1).tolist() == [14, 16, 14, 16] and (inputs["attention_mask"][:, -1] == 1).all()


def test_weights_are_those_that_a_new_token_runs_through() -> None:
    model = stock_model(tiny_checkpoint("llama"))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert breakdown.weights_read(model, Setting(8, 1, 2), grows=False) == sum(m.weight.nbytes for m in linears)
    model = stock_model(tiny_checkpoint("t5"))  # not the encoder, and K and V of cross-attention are there already
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    run_through = {name: m for name, m in linears.items() if not name.startswith("encoder") and "EncDecAttention.k" not in name
                   and "EncDecAttention.v" not in name}  # fmt: skip
    read = breakdown.weights_read(model, Setting(8, 1, 2), grows=False)
    assert read == sum({m.weight.data_ptr(): m.weight.nbytes for m in run_through.values()}.values())


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_all_time_is_somewhere_and_nothing_stays_watched(name: str) -> None:
    model = stock_model(tiny_checkpoint(name))
    model.set_attn_implementation("sdpa")
    before = DynamicLayer.update, GrowingLayer.update, ALL_ATTENTION_FUNCTIONS["sdpa"]
    found = breakdown.breakdown(model, Setting(8, 2, 6), grows=False)
    assert set(found) == set(breakdown.PARTS) and all(seconds > 0 for seconds in found.values())
    assert (DynamicLayer.update, GrowingLayer.update, ALL_ATTENTION_FUNCTIONS["sdpa"]) == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_runs_inside_another_part_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0])
    watches = breakdown.Stopwatches(torch.device("cpu"))
    monkeypatch.setattr(watches, "_now", lambda: next(now))
    watches.timed("attention", watches.timed("cache", lambda: None))()
    assert watches.seconds == {"attention": 7.0, "cache": 3.0}


def test_peaks_are_of_the_work_alone() -> None:
    with machine.peak_memory() as idle:
        pass
    if idle.num_bytes is None:
        pytest.skip("this system does not tell the peak of resident memory")
    with machine.peak_memory() as busy:
        torch.ones(1 << 24)
    assert idle.num_bytes < 2**23 and 2**26 <= busy.num_bytes + 2**20


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_named_shapes_are_models_that_fold(shape: str) -> None:
    config = shapes._grouped(shapes.shape_config(shape, layers=1), 1, shape)
    counts = config.get("num_key_value_heads") or {site["kv_heads"] for site in config["headfold"]["sites"]}
    assert counts in (1, {1})


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_random_models_of_a_shape_share_all_but_keys_and_values(name: str) -> None:
    where = str(tiny_checkpoint(name))
    config = shapes.shape_config(where)
    first = shapes.random_model(config, None, dtype=torch.float32, where=where)
    other = shapes.random_model(config, 2, dtype=torch.float32, like=first, where=where)
    own = dict(first.named_parameters())
    differing = {path for path, parameter in other.named_parameters() if parameter is not own.get(path)}
    assert differing and all("attn" in path.lower() or "attention" in path.lower() for path in differing)
    assert set(generation.generate(other, Setting(6, 1, 3), grows=False).num_kv_heads) == {2}
    logits = other(**tiny_sample(name)).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_the_command_line_times_and_draws(run, folded: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ("bench", folded, "--context", "12", "--batch", 2, "--new-tokens", 4, "--rounds", 1)
    shown = run(*words, "--plot", tmp_path / "plot.png")
    assert shown.code == 0, shown.err
    assert "headfold" in shown.out and "sdpa" in shown.out and "GB/s" in shown.out and "first token" in shown.out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run(*words, "--json", "--skip-prefill", "--profile", tmp_path / "traces").out)
    assert {row["attention"] for row in found["rows"]} == {"headfold", "sdpa"} and found["skip_prefill"]
    assert set(found["rows"][0]["parts"]) == set(breakdown.PARTS)
    for trace in list((tmp_path / "traces").iterdir()):
        assert json.loads(trace.read_text())["traceEvents"]
    assert len(list((tmp_path / "traces").iterdir())) == 2


def test_a_shape_is_timed_at_several_counts(run) -> None:  # noqa: F811
    where = tiny_checkpoint("t5", torch.float32)
    words = ("bench", "--shape", where, "--kv-heads", "8,2,1", "--attention", "headfold", "--dtype", "float32")
    found = json.loads(run(*words, "--context", 12, "--batch", 1, "--new-tokens", 3, "--rounds", 1, "--json").out)
    assert [row["num_kv_heads"] for row in found["rows"]] == [[8], [2], [1]]
    assert found["rows"][0]["kv_bytes"] == 8 * found["rows"][2]["kv_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "MODEL or --shape"),
        (("--kv-heads", "2"), "--shape"),
        (("--shape", "no-such-shape"), "llama-2-7b"),
        (("--shape", "attention", "--layers", "3"), "1 to 2 layers"),
        (("--shape", "attention", "--kv-heads", "3"), "divides its 32"),
        (("--shape", "attention", "--kv-heads", "many"), "counts such as"),
        (("--shape", "attention", "--dtype", "int8"), "bfloat16"),
        (("--shape", "attention", "--plot", "plot.xyz"), ".png"),
        (("--shape", "llama-2-13b", "--dtype", "float64"), "fewer --layers"),
        (("--shape", "attention", "--attention", "nonsense", "--layers", "1"), "nonsense"),
        (("--shape", "attention", "--batch", "0"), "counts such as"),
        (("--shape", "attention", "--context", "1000000"), "at most 131072"),
        (("--shape", "attention", "--context", "100000", "--batch", "100000"), "free"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_a_line(run, words: tuple[str, ...], said: str) -> None:  # noqa: F811
    refused = run("bench", *words)
    assert refused.code == 2 and refused.out == "" and said in refused.err
    assert len(refused.err.strip().splitlines()) == 1, refused.err


@pytest.mark.parametrize("name", ["vit", "bert", "whisper"])
def test_models_that_write_no_text_from_text_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="writes text"):
        bench([tiny_checkpoint(name, torch.float32)])


@pytest.mark.parametrize(
    ("config", "said"),
    [("{", "not valid JSON"), ("{}", "architectures"), ('{"architectures": ["Strange"]}', "Strange")],
)
def test_a_shape_that_is_none_is_refused(run, tmp_path: Path, config: str, said: str) -> None:  # noqa: F811
    (tmp_path / "config.json").write_text(config)
    refused = run("bench", "--shape", tmp_path)
    assert refused.code == 2 and said in refused.err and len(refused.err.strip().splitlines()) == 1


def test_classes_without_named_attention_run_their_own(run) -> None:  # noqa: F811
    found = bench([tiny_checkpoint("bloom", torch.float32)], **SMALL)
    assert [row.attention for row in found.rows] == ["eager in place", "eager"]
    assert any("takes no attention by name" in note for note in found.notes)
    found = bench([tiny_checkpoint("gemma2", torch.float32)], **SMALL)
    assert [row.attention for row in found.rows] == ["headfold", "eager"]


def test_labels_tell_models_apart(tmp_path: Path) -> None:
    for parent in "ab":
        shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / parent / "out")
    found = bench([tmp_path / "a" / "out", tmp_path / "b" / "out"], attentions=("headfold",), **SMALL)
    assert [row.model for row in found.rows] == ["a/out", "b/out"]


def row(**facts: Any) -> Any:
    given = dict(model="m", attention="headfold", num_kv_heads=(8,), context=1024, batch=1, per_sample=1.0) | facts
    return type("Row", (), given)()


def test_curves_are_labelled_by_what_differs() -> None:
    rows = [row(num_kv_heads=(n,), attention=name, per_sample=n) for name in ("headfold", "sdpa") for n in (8, 1)]
    assert timings._curves(rows, "num_kv_heads", "per_sample") == {
        "headfold": [(1, 1), (8, 8)],
        "sdpa": [(1, 1), (8, 8)],
    }
    rows = [row(model=model, context=context) for model in "ab" for context in (1, 2)]
    assert set(timings._curves(rows, "context", "per_sample")) == {"a", "b"}
    rows = [row(model="a", num_kv_heads=(8,)), row(model="b", num_kv_heads=(2,))]
    assert timings._curves(rows, "num_kv_heads", "per_sample") == {"headfold": [(2, 1.0), (8, 1.0)]}
