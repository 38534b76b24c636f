"""Folds to MLA: what is MLA in disguise is found exactly, the stock class computes what the weights mean, and what cannot be is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from latent_models import RANK, ROTARY_DIM, disguised, statistics
from safetensors.torch import load_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_fold import failing, same_bytes
from tiny import readable_checkpoint, stock_logits, stock_model, tiny_checkpoint, tiny_sites

import headfold
from headfold.checkpoint.reader import Checkpoint
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.core.stats import SiteStats
from headfold.families.cached import stored_kv_bytes_per_token
from headfold.in_memory import models
from headfold.latent import job
from headfold.latent.attention import LatentAttention
from headfold.latent.choice import possible_shapes
from headfold.latent.fit import fit
from headfold.latent.moments import SiteMoments, site_moments
from headfold.latent.recorded import as_heads, with_heads
from headfold.latent.request import LatentRequest
from headfold.latent.rotation import frequencies, rotated
from headfold.latent.site import Latent
from headfold.latent.target import NORM_EPSILON, Shape, read_site, site_tensors
from headfold.stats_file import StatsFile, write_stats

EXACT: dict[str, Any] = dict(to="mla", kv_rank=RANK, rope_dim=ROTARY_DIM, refit=False)
SHAPE = Shape(rank=5, rotary_dim=4, base=100.0, nope_dim=3, value_dim=2)


def kv_bytes_on_disk(directory: Path, itemsize: int) -> int:
    checkpoint = Checkpoint.open(directory)
    return stored_kv_bytes_per_token(checkpoint.config, checkpoint.tensors, itemsize)


def drawn(dtype: torch.dtype = torch.float64) -> Latent:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return Latent(normal(4, 7, 12), normal(5, 12), normal(4, 12), normal(4, 3, 5), normal(4, 2, 5), normal(4, 2, 12))


def moments_of(seed: int = 0) -> SiteMoments:
    site, heads = tiny_sites(tiny_checkpoint("llama", seed=seed))[0]
    freedom = dataclasses.replace(heads.key_freedom, frequencies=(1.0, 0.1, 0.01, 0.001), context=64)
    return site_moments(dataclasses.replace(heads, key_freedom=freedom), SiteStats.isotropic(heads.k.shape[2] - 1))


@pytest.mark.parametrize(
    "fields", [{}, {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=str
)
def test_a_disguised_mla_model_is_found_exactly(fields: dict[str, Any], tmp_path: Path) -> None:
    """With another epsilon too, which scales the whole residual stream, tied to the logits or not."""
    source = disguised(tmp_path / "source", torch.float64, **fields)
    result = headfold.fold(source, tmp_path / "out", stats=statistics(source, tmp_path / "s.safetensors"), **EXACT)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["kv_lora_rank"], config["qk_rope_head_dim"]) == (
        ["DeepseekV3ForCausalLM"],
        6,
        4,
    )
    assert result.kv_bytes_after == kv_bytes_on_disk(tmp_path / "out", 8)
    assert "auto_map" not in config and result.verification.passed and result.kv_bytes_after == 2 * (6 + 4) * 8
    assert max(result.site_errors.values()) < 1e-9
    assert_tight_through_float32_norms(stock_logits(tmp_path / "out"), stock_logits(source))


def test_statistics_that_lack_a_site_are_refused_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "staged", failing(job.staged, 0))
    source = tiny_checkpoint("llama", torch.float32)
    path = statistics(source, tmp_path / "s.safetensors")
    stats = StatsFile(path)
    kept = {name: stats[name] for name in list(stats)[1:]}
    write_stats(tmp_path / "less.safetensors", kept, stats.metadata)
    with pytest.raises(UserError, match="expected the statistic scatter for layers.0"):
        headfold.fold(source, tmp_path / "out", stats=tmp_path / "less.safetensors", **EXACT)
    assert [each.name for each in tmp_path.iterdir() if "out" in each.name] == []


def test_a_smaller_latent_loses_something(tmp_path: Path) -> None:
    source = disguised(tmp_path / "source", torch.float64)
    stats = statistics(source, tmp_path / "s.safetensors")
    headfold.fold(source, tmp_path / "out", stats=stats, **EXACT | {"kv_rank": RANK - 1})
    assert_differs(stock_logits(tmp_path / "out"), stock_logits(source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_the_class_is_a_constant_on_the_latents_that_are_written(dtype: torch.dtype) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    site, inputs = drawn(dtype), torch.randn(64, 12).to(dtype)
    tensors = site_tensors(site, "a", 1.0)
    norm = DeepseekV3RMSNorm(site.rank).to(dtype)
    assert norm.variance_epsilon == NORM_EPSILON
    norm.weight.data = tensors["a.kv_a_layernorm.weight"]
    small = inputs @ tensors["a.kv_a_proj_with_mqa.weight"][: site.rank].T
    plain = small.double() / NORM_EPSILON**0.5 * norm.weight.double()
    relative = (norm(small).double() / plain - 1).abs().max().item()
    assert relative <= 2 * torch.finfo(dtype).eps


def test_a_site_is_read_as_it_was_written() -> None:
    site = drawn()
    tensors = site_tensors(site, "a", 0.25)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "a.q_proj.weight": (28, 12), "a.kv_a_proj_with_mqa.weight": (9, 12), "a.kv_a_layernorm.weight": (5,),
        "a.kv_b_proj.weight": (20, 5), "a.o_proj.weight": (12, 8),
    }  # fmt: skip
    attention = LatentAttention(read_site(tensors.__getitem__, SHAPE, "a", 0.25), SHAPE.turns)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    assert_tight(attention(x)[0], LatentAttention(site, SHAPE.turns)(x)[0])


def test_a_site_as_heads_and_back_is_the_same() -> None:
    site = drawn()
    back = with_heads(site, as_heads(site))
    for name, tensor in back.tensors().items():
        assert_bitwise(tensor, getattr(site, name))


def test_every_plane_of_the_fastest_is_one_of_the_original() -> None:
    whole, half = frequencies(10_000.0, 16), frequencies(10_000.0 ** (8 / 16), 8)
    assert_tight(half, whole[:4])
    between = frequencies(10_000.0 ** (0.5 * 16 / 16), 16)
    assert_tight(between[::2], whole[:4])


def test_scores_of_rotated_rows_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 4, dtype=torch.float64)
    rows = [rotated(x.expand(9, 4), frequencies(7.0, 4)) for x in (q, k)]
    scores = rows[0] @ rows[1].T
    assert_tight_through_float32_norms(scores[5:, 3:7].diagonal(), scores[2, 0].expand(4))


def test_the_alternation_never_ends_above_where_it_began() -> None:
    moments = moments_of()
    turns = torch.tensor([1.0, 0.1], dtype=torch.float64)
    errors = [fit(moments, 8, turns, rounds).error for rounds in (1, 2, 4, 40)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    ranks = [fit(moments, rank, turns).error for rank in (2, 8, 24)]
    assert ranks == sorted(ranks, reverse=True)


def test_latent_dims_are_uncorrelated_and_of_mean_energy_one() -> None:
    moments, turns = moments_of(), torch.tensor([1.0, 0.1], dtype=torch.float64)
    latent = fit(moments, 8, turns).mix[4:]
    gram = latent @ moments.gram @ latent.T
    assert_tight(gram, gram.diagonal().diag())
    assert gram.diagonal().mean().item() == pytest.approx(1)


def test_the_predicted_error_is_that_of_drawn_queries_and_distances() -> None:
    """Drawn with the independence that the formula assumes."""
    moments, turns = moments_of(), torch.tensor([1.0, 0.1], dtype=torch.float64)
    found = fit(moments, 8, turns)
    generator = torch.Generator().manual_seed(0)
    distances = torch.multinomial(moments.distances.shares[0, :64], 4000, replacement=True, generator=generator)
    chol = torch.linalg.cholesky(moments.gram + 1e-9 * torch.eye(len(moments.gram), dtype=torch.float64))
    missed = energy = 0.0
    for head, reads in enumerate(moments.kv_of_query.tolist()):
        y = torch.randn(len(distances), len(chol), dtype=torch.float64, generator=generator) @ chol.T
        root = torch.linalg.cholesky(moments.queries[head])
        q = torch.randn(len(distances), 8, dtype=torch.float64, generator=generator) @ root.T
        k, shared = y[:, reads * 8 : reads * 8 + 8], y @ found.mix.T
        own = turned(k, moments.frequencies, distances)
        read = torch.cat([turned(shared[:, :4], turns, distances), shared[:, 4:]], 1) @ found.keys[head].T
        missed += float((q * (own - read)).sum(1).square().mean())
        energy += float((q * own).sum(1).square().mean())
        v = y[:, 64 + reads * 8 : 72 + reads * 8]
        lost = v - shared[:, 4:] @ found.values[head].T
        missed += float(torch.einsum("na,ab,nb->n", lost, moments.outputs[head], lost).mean())
        energy += float(torch.einsum("na,ab,nb->n", v, moments.outputs[head], v).mean())
    assert missed / energy == pytest.approx(found.error, rel=0.05)


def turned(rows: torch.Tensor, frequency: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    z = torch.complex(rows[:, 0::2], rows[:, 1::2]) * torch.polar(
        torch.ones(1, dtype=torch.float64), -distance[:, None] * frequency
    )
    return torch.stack([z.real, z.imag], -1).flatten(1)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path_factory.mktemp("latent") / "readable", tokenizer)


def test_killed_and_run_again_gives_the_same_bytes(
    readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(to="mla", kv_rank="1/2", tokens=2048, context=32)
    headfold.fold(readable, tmp_path / "calm", **options)
    for name, after in (("refitted", 1), ("compare_with_twin", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(job, name, failing(getattr(job, name), after))
            with pytest.raises(KeyboardInterrupt):
                headfold.fold(readable, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    result = headfold.fold(readable, tmp_path / "out", **options)
    assert result.kv_bytes_after * 2 == result.kv_bytes_before
    same_bytes(tmp_path / "out", tmp_path / "calm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm", "out"]


def test_a_corrupt_site_of_a_killed_run_is_named(
    readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(to="mla", kv_rank="1/2", tokens=2048, context=32, refit=False)
    with monkeypatch.context() as patch:
        patch.setattr(job, "compare_with_twin", failing(job.compare_with_twin, 0))
        with pytest.raises(KeyboardInterrupt):
            headfold.fold(readable, tmp_path / "out", **options)
    site = next((tmp_path / "out.partial").rglob("sites/*.safetensors"))
    whole = site.read_bytes()
    for damaged in (whole[:-1], whole.replace(b'"error"', b'"errox"'), whole.replace(b'"down"', b'"dowm"')):
        assert damaged != whole
        site.write_bytes(damaged)
        with pytest.raises(UserError, match="corrupt file; remove it"):
            headfold.fold(readable, tmp_path / "out", **options)
    site.unlink()
    headfold.fold(readable, tmp_path / "out", **options)


def test_a_wrong_file_never_gets_its_name(readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights for whoever reads them, but with a latent so large that the norm of the class divides by its size."""

    def wrong(site: Latent, prefix: str, scale: float) -> dict[str, torch.Tensor]:
        tensors, larger = site_tensors(site, prefix, scale), 2.0**30
        shared, gain = f"{prefix}.kv_a_proj_with_mqa.weight", f"{prefix}.kv_a_layernorm.weight"
        latent, rotary = tensors[shared].split([site.rank, site.rotary_dim])
        return tensors | {shared: torch.cat([latent * larger, rotary]), gain: tensors[gain] / larger}

    monkeypatch.setattr(job, "site_tensors", wrong)
    with pytest.raises(UserError, match="plain computation"):
        headfold.fold(readable, tmp_path / "out", to="mla", kv_rank="1/2", refit=False, tokens=512, context=32)
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, dict[str, Any]] = {
    "kv-heads": dict(to="mla", kv_rank=8, kv_heads=2), "head-dim-multiple": dict(to="mla", kv_rank=8, head_dim_multiple=2),
    "merge": dict(to="mla", kv_rank=8, merge="mean"), "heal": dict(to="mla", kv_rank=8, heal=True),
    "--kv-heads": dict(to="mla", kv_rank=8, kv_heads=0),
    "expected mla": dict(to="gqa", kv_rank=8), "go with --to mla": dict(kv_rank=8), "got none": dict(to="mla"),
    "even number": dict(to="mla", kv_rank=8, rope_dim=3), "got 3/2": dict(to="mla", kv_rank="3/2"),
    "got ten": dict(to="mla", kv_rank="ten"), "twice the head_dim": dict(to="mla", kv_rank=8, rope_dim=40),
    "share of at least": dict(to="mla", kv_rank="1/100"), "got 1/0": dict(to="mla", kv_rank="1/0"),
    "got 1e99999999": dict(to="mla", kv_rank="1e99999999"), "fewer than the 128": dict(to="mla", kv_rank=124, rope_dim=4),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_options_that_do_not_go_together_are_refused_in_one_line(said: str, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", torch.float32)
    with pytest.raises(UserError, match=said) as refused:
        headfold.fold(source, tmp_path / "out", refit=False, **REFUSED[said])
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("llama-bias-gqa", {}, "no such bias"), ("mistral", {}, "no sliding window"), ("qwen2", {}, "got qwen2"), ("gpt2", {}, "got gpt2"),
        ("qwen3", {}, "got qwen3"), ("t5", {}, "got t5"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "got linear"),
    ],
)  # fmt: skip
def test_models_that_the_class_cannot_be_are_refused_in_one_line(
    name: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = tiny_checkpoint(name, torch.float32) if not fields else None
    if made is None:
        made = tmp_path / "source"
        made.mkdir()
        for file in tiny_checkpoint(name, torch.float32).iterdir():
            (made / file.name).write_bytes(file.read_bytes())
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=said) as refused:
        headfold.fold(made, tmp_path / "out", to="mla", kv_rank=8, tokens=64, context=16, calibration="self")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("heads", "share"), [(32, "1/2"), (32, "1/8"), (8, "1/2"), (1, "1/64")])
def test_every_share_has_shapes(heads: int, share: str, tmp_path: Path) -> None:
    """Also where a share of the cached numbers is more than the largest rotary key."""
    made = open_source(tiny_checkpoint("llama", torch.float32))
    site = dataclasses.replace(made.sites[0], num_heads=heads, num_kv_heads=heads, head_dim=128)
    request = LatentRequest.of("mla", share, None)
    assert request is not None
    shapes = possible_shapes(dataclasses.replace(made, every_site=[site]), request)
    assert len(shapes) >= 2
    assert {shape.cached for shape in shapes} == {request.cached(dataclasses.replace(made, every_site=[site]))}
    assert all(shape.rank >= 2 and shape.rotary_dim % 2 == 0 and 2 <= shape.rotary_dim <= 256 for shape in shapes)


def test_options_are_checked_before_a_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected mla, got gqa"):
        headfold.fold(tmp_path / "none", tmp_path / "out", to="gqa", kv_rank=8)
    assert LatentRequest.of("mla", 8, 4, head_dim_multiple="1", group="swap", heal=False) == LatentRequest(8, None, 4)


def test_a_share_is_one_of_all_cached_numbers() -> None:
    assert LatentRequest.of("mla", "25%", None) == LatentRequest.of("mla", "1/4", None)
    assert LatentRequest.of("mla", 512, 64) == LatentRequest(512, None, 64)


def test_weights_keep_what_is_not_attention(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", torch.float32)
    headfold.fold(source, tmp_path / "out", stats=statistics(source, tmp_path / "s.safetensors"), **EXACT)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    same = [name for name in before if "self_attn" not in name]
    assert same and all(torch.equal(before[name], after[name]) for name in same)


def test_a_fold_opened_by_headfold_generates_what_the_stock_class_does(readable: Path, tmp_path: Path) -> None:
    headfold.fold(readable, tmp_path / "out", to="mla", kv_rank=20, rope_dim=8, refit=False, tokens=512, context=32)
    prompt = torch.arange(12)[None] + 3
    keywords: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = stock_model(tmp_path / "out", torch.float32).generate(prompt, **keywords)
    assert torch.equal(headfold.load(tmp_path / "out", dtype=torch.float32).generate(prompt, **keywords), expected)


def test_a_model_in_memory_is_returned_as_the_target_class(readable: Path) -> None:
    model = stock_model(readable, torch.float32)
    sample = torch.arange(512).view(16, 32) % 50 + 3
    folded: Any = headfold.fold(
        model, to="mla", kv_rank=20, rope_dim=8, refit=False, calibration=[{"input_ids": sample}]
    )
    assert type(folded).__name__ == "DeepseekV3ForCausalLM" and folded.headfold.shape.rank == 20
    folded.config._name_or_path = ""
    assert models._origin(folded) == str(readable)
