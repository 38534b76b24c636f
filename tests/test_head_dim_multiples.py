"""head_dim multiples: fewer K/V heads with several times the head_dim, in stock classes and in slots."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from kinds import COVER, KINDS
from test_cli import model, run  # noqa: F401
from tiny import (
    FLOAT32_NORMS,
    FOREIGN,
    answer_of,
    stock_logits,
    stock_model,
    tiny_checkpoint,
    tiny_sample,
    tiny_sites,
    tiny_tokens,
)
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import headfold
from headfold.calibration import collect
from headfold.conversion.fold_result import FoldResult
from headfold.conversion.source import Source, open_source
from headfold.conversion.twin import Twin
from headfold.core.errors import UserError
from headfold.core.plan import head_dim_refusal
from headfold.planning import make_plan
from headfold.refine.refit import refit
from headfold.rotary_tables import table_of_multiple
from headfold.runtime.regrouping import installed_heads
from headfold.stats_file import write_stats
from headfold.surgery import query_order, site_heads, site_tensors

MULTIPLE = 2


@cache
def opened(name: str) -> tuple[Source, dict]:
    source = open_source(tiny_checkpoint(name))
    return source, collect(stock_model(source.checkpoint.path), source.sites, tiny_sample(name, 8, seed=1))


def takes_multiples(name: str) -> bool:
    """A whole CLIP is folded tower by tower."""
    return name != "clip" and not any(head_dim_refusal(site, MULTIPLE) for site, _ in tiny_sites(tiny_checkpoint(name)))


TAKEN = sorted(name for name in KINDS if takes_multiples(name))
FREE = [name for name in TAKEN if all(site.any_head_dim for site, _ in tiny_sites(tiny_checkpoint(name)))]
SLOTTED = [name for name in TAKEN if name not in FREE and name in COVER]


def graded(name: str):
    return assert_tight_through_float32_norms if name in FLOAT32_NORMS or name in FOREIGN else assert_tight


def folded(name: str, out: Path, kv_heads: str = "1/1", **options) -> FoldResult:
    """Without data of its own: what it needs is given."""
    source, stats = opened(name)
    path = out.with_name(f"{out.name}.stats.safetensors")
    write_stats(
        path,
        stats,
        {"model": source.checkpoint.fingerprint(), "source": "none", "seed": "0", "tokens": "8", "context": "16"},
    )
    return headfold.fold(
        source.checkpoint.path, out, kv_heads=kv_heads, head_dim_multiple=MULTIPLE, stats=path, refit=False, **options
    )


@pytest.mark.parametrize("name", TAKEN)
def test_a_multiple_of_the_size_of_the_groups_loses_nothing_in_slots(name: str) -> None:
    source, stats = opened(name)
    read = source.checkpoint.read
    stock = stock_model(source.checkpoint.path)
    plan = make_plan(source.sites, read, "1/1", source="tiny", stats=stats, head_dim_multiple=MULTIPLE)
    expected = answer_of(stock, tiny_sample(name))
    replaced_heads = [
        (site, site_tensors(site, plan, read, stats, num_kv_heads=site.num_kv_heads), site.num_kv_heads, MULTIPLE)
        for site in source.sites
    ]
    with installed_heads(stock, replaced_heads):
        graded(name)(answer_of(stock, tiny_sample(name)), expected)
    graded(name)(answer_of(stock, tiny_sample(name)), expected)


@pytest.mark.parametrize("name", FREE)
def test_a_class_of_any_head_dim_takes_them_stock_and_to_the_end_of_its_context(name: str, tmp_path: Path) -> None:
    result = folded(name, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "headfold" not in config and result.verification.passed
    site = open_source(tiny_checkpoint(name)).sites[0]
    assert result.after.kv_bytes_per_token == result.before.kv_bytes_per_token
    assert (
        result.after.head_dims == str(MULTIPLE * site.head_dim)
        and result.num_kv_heads_after == site.num_kv_heads // MULTIPLE
    )
    longest = min(config.get("max_position_embeddings", 64), 64)
    tokens = tiny_tokens(2, longest)
    # Frequencies are float32 numbers, of which some are missed by their last bit.
    assert_tight_through_float32_norms(
        stock_logits(tmp_path / "out", tokens), stock_logits(tiny_checkpoint(name), tokens)
    )


@pytest.mark.parametrize("name", SLOTTED)
def test_other_classes_take_them_in_the_runtime(name: str, tmp_path: Path) -> None:
    result = folded(name, tmp_path / "out", verify=False)
    assert result.num_kv_heads_after * MULTIPLE == result.num_kv_heads_before
    for options in ({}, {"attn_implementation": "eager"}):
        found = headfold.load(tmp_path / "out", **options)
        graded(name)(
            answer_of(found, tiny_sample(name)), answer_of(stock_model(tiny_checkpoint(name)), tiny_sample(name))
        )


@pytest.mark.parametrize("name", ["llama", "phi", "cohere", "glm"])
def test_a_multiple_loses_less_than_as_much_cache_in_more_heads(name: str) -> None:
    source, stats = opened(name)
    read = source.checkpoint.read

    def lost(times: int) -> float:
        made = make_plan(source.sites, read, "1/2", source="tiny", group="swap", stats=stats, head_dim_multiple=times)
        return sum(s.error.key / s.energy.key + s.error.value / s.energy.value for s in made.sites.values())

    assert 0 < lost(4) < lost(2) < lost(1)


@pytest.mark.parametrize("name", ["gpt2", "t5", "opt", "bloom"])
def test_slots_are_cached_and_read_token_by_token(name: str, tmp_path: Path) -> None:
    """Few queries at once take another path than many."""
    folded(name, tmp_path / "out", "1/2", verify=False)
    stock = headfold.load(tmp_path / "out")
    sample = tiny_sample(name, 2)
    sample = {key: value for key, value in sample.items() if key in ("input_ids", "attention_mask")}
    how = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    once, cached = (stock.generate(**sample, **how, use_cache=use) for use in (False, True))
    assert torch.equal(once.sequences, cached.sequences)
    for with_cache, without in zip(cached.logits, once.logits, strict=True):
        assert_tight(with_cache, without)


ALONE = """
import copy, sys
sys.modules["headfold"] = None  # importing it raises
import torch, transformers

for directory, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    inputs = torch.load(directory + "/inputs.pt")
    stock = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True, dtype=torch.float64)
    stock.save_pretrained(directory + "/again")
    again = getattr(transformers, auto).from_pretrained(directory + "/again", trust_remote_code=True, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(again)(**inputs)[0], copy.deepcopy(stock)(**inputs)[0])
    torch.save(copy.deepcopy(stock)(**inputs)[0], directory + "/answer.pt")
"""


def test_the_code_beside_the_weights_opens_slots_without_headfold(tmp_path: Path) -> None:
    autos, words = {"gpt2": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}, []
    inputs = {name: {"input_ids": tiny_tokens()} for name in autos}
    inputs["t5"]["decoder_input_ids"] = tiny_tokens(seed=1)
    for name, auto in autos.items():
        (tmp_path / name).mkdir()
        folded(name, tmp_path / name / "out", "1/2", verify=False)
        torch.save(inputs[name], tmp_path / name / "out/inputs.pt")
        words += [str(tmp_path / name / "out"), auto]
    ran = subprocess.run([sys.executable, "-c", ALONE, *words], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for name in autos:
        with torch.inference_mode():
            expected = headfold.load(tmp_path / name / "out")(**inputs[name])[0]
        assert_tight(torch.load(tmp_path / name / "out/answer.pt"), expected)


THETA = {"rope_theta": 10000.0}
TABLES = {
    "default": {"rope_type": "default", **THETA},
    "half of the dims": {"rope_type": "default", **THETA, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64, **THETA},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                 "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0], "factor": 4.0,
                 "original_max_position_embeddings": 64, **THETA},
}  # fmt: skip


def frequencies(config, length: int) -> tuple[torch.Tensor, float]:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim), 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("multiple", [2, 3, 4])
@pytest.mark.parametrize("kind", TABLES)
def test_every_frequency_stands_multiple_times_in_the_table_to_the_last_bit(kind: str, multiple: int) -> None:
    fields = dict(model_type="llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                  max_position_embeddings=256)  # fmt: skip
    config = fields | {"rope_parameters": dict(TABLES[kind])}
    source = AutoConfig.for_model(**config)
    large = AutoConfig.for_model(
        **fields | {"head_dim": 16 * multiple}, **table_of_multiple(config, "config.json", multiple)
    )
    for length in (1, 256):  # a longrope has two tables, and all others one
        (before, scaling), (after, new_scaling) = frequencies(source, length), frequencies(large, length)
        # One unit in the last place: not every number is a quotient of two floats.
        torch.testing.assert_close(after, before.repeat_interleave(multiple), rtol=2**-23, atol=0)
        assert new_scaling == scaling


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_refit_of_a_multiple_comes_nearer_to_the_block(name: str) -> None:
    source, stats = opened(name)
    stock, read = stock_model(source.checkpoint.path), source.checkpoint.read
    plan = make_plan(source.sites, read, "1/2", source="tiny", stats=stats, head_dim_multiple=MULTIPLE)
    sample = tiny_sample(name, 8, seed=1)
    refits = refit(
        stock,
        source.sites,
        lambda site: site_heads(site, plan, read, stats),
        sample,
        order=lambda site: query_order(site, plan),
    )

    def distance(fitted) -> float:
        replaced_heads = [
            (s, site_tensors(s, plan, read, stats, fitted, num_kv_heads=s.num_kv_heads), s.num_kv_heads, MULTIPLE)
            for s in source.sites[:1]
        ]
        expected = answer_of(stock, sample)
        with installed_heads(stock, replaced_heads):
            return (answer_of(stock, sample) - expected).norm().item()

    assert distance(refits) < 0.95 * distance(None)


def test_multiples_that_cannot_be_had_are_refused_in_a_line(run, model: Path, tmp_path: Path) -> None:  # noqa: F811
    text = model.parent / "text.txt"
    for words, said in [
        (["--kv-heads", 4, "--head-dim-multiple", 3], "expected a divisor of the requested 4 K/V heads"),
        (["--kv-heads", 1, "--head-dim-multiple", 2], "expected a divisor of the requested 1 K/V heads"),
        (["--kv-heads", 4, "--head-dim-multiple", "two"], "expected a number such as 2, or auto"),
        (
            ["--kv-heads", 4, "--head-dim-multiple", 2, "--merge", "mean"],
            "--merge mean keeps the source's head_dim",
        ),
        (["--kv-heads", 4, "--head-dim-multiple", 16], "expected at most 8"),
        (["--kv-heads", 4, "--head-dim-multiple", "²"], "expected a number such as 2, or auto"),
        (
            ["--kv-heads", 4, "--head-dim-multiple", "auto", "--merge", "mean"],
            "--head-dim-multiple auto: --merge mean keeps the source",
        ),
    ]:
        found = run("fold", model, tmp_path / "out", *words, "--calibration", text)
        assert found.code == 2 and said in found.err and len(found.err.strip().splitlines()) == 1, found.err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3", "its keys pass a norm, so one head"),
        ("phi3", "q, k and v are one tensor on disk"),
        ("stablelm", "its class requires the source's head_dim"),
        ("falcon-multi-query", "expected at most 1"),
    ],
)
def test_families_without_multiples_are_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        headfold.fold(tiny_checkpoint(name), tmp_path / "out", kv_heads="1/1", head_dim_multiple=MULTIPLE)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "t5"])
def test_multiples_may_differ_between_sites_in_slots(name: str, tmp_path: Path) -> None:
    """As only a plan made by hand has them; the twin of the sites without a multiple is an ordinary one."""
    source, stats = opened(name)
    read = source.checkpoint.read
    large, plain = (
        make_plan(
            source.sites, read, kv_heads, source=source.checkpoint.fingerprint(), stats=stats, group="contiguous",
            head_dim_multiple=multiple,
        )
        for kv_heads, multiple in (("1/1", MULTIPLE), ("1/2", 1))
    )  # fmt: skip
    mixed = dataclasses.replace(plain, sites={**plain.sites, source.sites[0].name: large.sites[source.sites[0].name]})
    mixture, expected = stock_model(source.checkpoint.path), stock_model(source.checkpoint.path)
    Twin(source, mixed, stats, None).install(mixture)
    Twin(source, plain, stats, None).install(expected)
    sample = tiny_sample(name)
    assert_differs(answer_of(mixture, sample), answer_of(expected, sample))
    for site in source.sites[1:]:
        a, b = (dict(one.get_submodule(site.module).named_parameters()) for one in (mixture, expected))
        for parameter in a:
            assert_bitwise(a[parameter], b[parameter])


@pytest.mark.parametrize(
    ("name", "said"), [("phi3", "one tensor on disk"), ("stablelm", "its class requires"), ("llama", "at most 8")]
)
def test_a_plan_of_multiples_that_cannot_be_had_is_refused(name: str, said: str, tmp_path: Path) -> None:
    source = open_source(tiny_checkpoint(name))
    made = make_plan(source.sites, source.checkpoint.read, "1/2", source=source.checkpoint.fingerprint(), merge="mean")
    times = 16 if name == "llama" else 2
    sites = {key: dataclasses.replace(site, head_dim=times * site.head_dim) for key, site in made.sites.items()}
    with pytest.raises(UserError, match=said):
        dataclasses.replace(made, sites=sites).check_source(source.checkpoint.fingerprint(), source.sites)


def test_slots_are_not_folded_again(tmp_path: Path) -> None:
    folded("t5", tmp_path / "out", verify=False)
    with pytest.raises(UserError, match="already folded"):
        open_source(tmp_path / "out")


def test_a_layout_for_slots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="layout native: heads with a larger head_dim than the source's can be written for headfold's runtime only",
    ):
        folded("gpt_neox", tmp_path / "out", layout="native")


def test_auto_takes_the_largest_multiple_that_the_count_allows(run, model: Path, tmp_path: Path) -> None:  # noqa: F811
    text = model.parent / "text.txt"
    options = ("--head-dim-multiple", "auto", "--calibration", text, "--tokens", 512, "--no-refit", "--json")
    found = run("fold", model, tmp_path / "out", "--kv-heads", 4, *options)
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["num_kv_heads_after"] == 1 and result["after"]["head_dims"] == "32"
    assert result["after"]["kv_bytes_per_token"] * 2 == result["before"]["kv_bytes_per_token"]
    assert result["after"]["weight_bytes"] > result["before"]["weight_bytes"]
    assert "--head-dim-multiple 4" in (tmp_path / "out/README.md").read_text()


def test_a_plan_of_a_multiple_is_a_file_that_fold_takes(run, model: Path, tmp_path: Path) -> None:  # noqa: F811
    stats = tmp_path / "stats.safetensors"
    assert run("calibrate", model, stats, "--calibration", model.parent / "text.txt", "--tokens", 512).code == 0
    made = run("plan", model, tmp_path / "plan.json", "--kv-heads", 4, "--head-dim-multiple", 2, "--stats", stats)
    assert made.code == 0 and "head_dim of a K/V head" in made.out
    options = ("--stats", stats, "--no-refit")
    assert run("fold", model, tmp_path / "planned", "--plan", tmp_path / "plan.json", *options).code == 0
    assert run("fold", model, tmp_path / "counted", "--kv-heads", 4, "--head-dim-multiple", 2, *options).code == 0
    a, b = (tmp_path / name / "model.safetensors" for name in ("planned", "counted"))
    assert a.read_bytes() == b.read_bytes()
    both = run("fold", model, tmp_path / "x", "--plan", tmp_path / "plan.json", "--head-dim-multiple", 2, *options)
    assert both.code == 2 and "--head-dim-multiple" in both.err


def test_a_budget_chooses_the_multiple_too(run, model: Path, tmp_path: Path) -> None:  # noqa: F811
    stats = tmp_path / "stats.safetensors"
    assert run("calibrate", model, stats, "--calibration", model.parent / "text.txt", "--tokens", 1024).code == 0
    made = run(
        "plan",
        model,
        tmp_path / "plan.json",
        "--kv-budget",
        "1/2",
        "--head-dim-multiple",
        "auto",
        "--stats",
        stats,
        "--no-refit",
    )
    assert made.code == 0, made.err
    sites = json.loads((tmp_path / "plan.json").read_text())["sites"]
    head_dims = {row["head_dim"] for row in sites.values()}
    assert len(head_dims) == 1 and head_dims.pop() > 8


def test_a_multiple_of_one_is_no_change() -> None:
    source, stats = opened("llama")
    read = source.checkpoint.read
    plans = [
        make_plan(source.sites, read, "1/2", source="tiny", group="swap", stats=stats, **options)
        for options in ({}, {"head_dim_multiple": 1})
    ]
    assert plans[0] == plans[1]
    for site in source.sites:
        a, b = (site_tensors(site, plan, read, stats) for plan in plans)
        for name in a:
            assert_bitwise(a[name], b[name])
    large = make_plan(source.sites, read, "1/2", source="tiny", group="swap", stats=stats, head_dim_multiple=MULTIPLE)
    assert_differs(*(next(iter(site_tensors(source.sites[0], p, read, stats).values()))[:1] for p in (plans[0], large)))
