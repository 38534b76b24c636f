"""How long a fold will take: the operations are those that torch counts, and what is told holds for what is done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint, stock_model, tiny_checkpoint, tiny_tokens
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import headfold
from headfold.calibration import collect
from headfold.cli import app
from headfold.conversion import fold_job
from headfold.conversion.calibration_config import CalibrationRequest
from headfold.conversion.estimate import estimated_seconds, item_operations
from headfold.conversion.fold_request import resolve_fold
from headfold.conversion.source import open_source
from headfold.conversion.teacher import Teacher
from headfold.refine.scope import Fits
from headfold.reports.tables import estimate
from headfold.stats_file import write_stats
from headfold.timing import machine, stages

NOTHING: dict[str, Any] = {"refit": set(), "heal": set()}


def counted(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Operations of the blocks on one window, as torch counts them: attention in full, though half of it is masked."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=tokens)
    return counter.get_total_flops() / len(tokens)


@pytest.mark.parametrize("name", ["llama", "llama-bias-gqa", "gpt2", "mixtral", "bert"])
def test_operations_of_a_pass_are_those_that_torch_counts(name: str) -> None:
    path = tiny_checkpoint(name, torch.float32)
    source, model = open_source(path, False), stock_model(path, torch.float32)
    model.set_attn_implementation("eager")
    at_8, at_32 = (item_operations(source, length) for length in (8, 32))
    found = {length: counted(model, tiny_tokens(2, length)) for length in (8, 32)}
    masked = 1 if name == "bert" else 2
    attention = sum(4 * 32 * 32 * site.num_heads * site.head_dim for site in source.every_site)
    assert at_8.blocks == pytest.approx(found[8], rel=0.05)
    assert at_32.blocks + attention * (1 - 1 / masked) == pytest.approx(found[32], rel=0.01)
    assert 0 < sum(at_32.sites.values()) < at_32.blocks


def test_the_operations_of_a_site_are_those_of_its_projections_and_attention() -> None:
    source = open_source(tiny_checkpoint("llama", torch.float32), False)
    # 8 query and 8 K/V heads of 8 dims, hidden size 48; 10 tokens.
    assert item_operations(source, 10).sites["layers.0.self"] == 2 * 10 * 4 * 48 * 64 + 4 * 10 * 10 * 64 / 2
    assert item_operations(source, 10).head == 2 * 10 * 61 * 48


def test_an_encoder_that_stays_is_not_trained() -> None:
    path = tiny_checkpoint("whisper", torch.float32)
    source, model = open_source(path, True), stock_model(path, torch.float32)
    model.set_attn_implementation("eager")
    frames = torch.zeros(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_encoder()(frames)
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    once = item_operations(source, 4)
    assert once.encoder == pytest.approx(counter.get_total_flops() - convolutions, rel=0.01)

    def trained(**how: bool) -> float:
        data = stages.CalibrationPass(once, 1, 8)
        found = stages.fitting_operations(
            data, calibrates=False, refits=(), heals="a", healed=1, heals_together=True, **how
        )
        return found["heal"].own

    assert trained() - trained(shares_encoder=True) == pytest.approx((stages.DISTILL - 1) * once.encoder)


def patches(config: dict[str, Any]) -> int:
    return (config["image_size"] // config["patch_size"]) ** 2 + 1


@pytest.mark.parametrize(
    ("name", "positions"), [("whisper", lambda config: config["max_source_positions"]), ("vit", patches)]
)
def test_frames_and_patches_are_the_positions_of_sound_and_images(
    name: str, positions: Callable[[dict[str, Any]], int]
) -> None:
    source = open_source(tiny_checkpoint(name, torch.float32), True)
    site, tensors, number = source.every_site[0], source.checkpoint.tensors, positions(source.checkpoint.config)
    linear = sum(2 * number * _size(tensors, site, role) for role in "qkvo")
    attention = 4 * number * number * site.num_heads * site.head_dim
    short, long = (item_operations(source, length).sites[site.name] for length in (4, 8))
    assert short == long == linear + attention
    if name == "whisper":  # K and V of every frame, though there are few tokens
        cross = next(one for one in source.every_site if one.reads_encoder)
        assert item_operations(source, 1).sites[cross.name] > 2 * number * _size(tensors, cross, "k")


def _size(tensors: Any, site: Any, role: str) -> int:
    rows, columns = tensors[site.tensor(role)].shape
    return rows * columns


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path_factory.mktemp("source") / "readable", tokenizer)


def told(
    path: Path, *, kv_heads: str = "1/2", tokens: int = 2**16, merge: str = "absorb", refit: bool = True,
    refit_by: str | None = None, heal: bool = False, heal_by: str = "block", source: str = "stdlib", verifies: bool = True,
    measured: bool = False, fitted: Any = NOTHING, **also: bool,
) -> dict[str, float]:  # fmt: skip
    opened = open_source(path, False)
    request = resolve_fold(
        opened, kv_heads=kv_heads, plan=None, head_dim_multiple=1, group="contiguous", merge=merge,
        fits=Fits(refit, refit_by, heal, heal_by=heal_by if heal else None), device="cpu",
        data=CalibrationRequest(source, tokens, context=32), stats=None,
    )  # fmt: skip
    teacher = Teacher(opened, request.calibration, "cpu", torch.float32)
    return estimated_seconds(teacher, request, measured=measured, fitted=fitted, verifies=verifies, **also)


def test_only_what_is_left_to_do_is_counted(readable: Path) -> None:
    assert [*told(readable, heal=True)] == [*stages.STAGES]
    assert [*told(readable)] == ["calibrate", "plan", "refit", "write", "verify"]
    assert [*told(readable, merge="mean", refit=False, verifies=False)] == ["write"]
    assert [*told(readable, measured=True)] == ["plan", "refit", "write", "verify"]
    assert [*told(readable, kv_heads="1/1", heal=True)] == ["calibrate", "plan", "write", "verify"]
    every = {"layers.0.self", "layers.1.self"}
    assert [*told(readable, measured=True, heal=True, fitted={"refit": every, "heal": every})] == [
        "plan", "write", "verify",
    ]  # fmt: skip


def test_the_parts_of_the_work_are_in_proportion(readable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "MEASURED_FROM", float("inf"))
    monkeypatch.setattr(stages, "SLOW", 1e6)  # so that rounding does not matter
    monkeypatch.setattr(stages, "DISK", 1e12)
    sizes = (2**10, 2**11, 2**16, 2**17, 2**18)
    times = [told(readable, heal=True, tokens=tokens) for tokens in sizes]
    calibrate, refit, heal, verify = ([one[s] for one in times] for s in ("calibrate", "refit", "heal", "verify"))
    assert [one / calibrate[0] for one in calibrate] == pytest.approx([tokens / 2**10 for tokens in sizes], rel=1e-3)
    assert refit[1] == pytest.approx(2 * refit[0], rel=1e-3)
    # From some size on the refit of W_q sees no more queries, so only its other parts take longer.
    assert refit[4] - refit[3] == pytest.approx(2 * (refit[3] - refit[2]), rel=1e-3)
    assert refit[2] < refit[3] < 2 * refit[2]
    assert len(set(heal)) == len(set(verify)) == 1  # so many tokens, however many are given
    once = times[2]
    assert told(readable, source="self")["calibrate"] > 2 * once["calibrate"]  # the text is written first
    together = told(readable, single_pass=True)
    assert together["calibrate"] == once["calibrate"] and together["refit"] < once["refit"]
    assert told(readable, source="self", drawn=True)["calibrate"] == once["calibrate"]
    half = told(readable, fitted={"refit": {"layers.0.self"}, "heal": {"layers.1.self"}}, heal=True)
    assert once["refit"] / 2 < half["refit"] < once["refit"] and half["heal"] < once["heal"]
    whole = [
        told(readable, heal=True, heal_by="model", fitted={"refit": set(), "heal": done})
        for done in (set(), {"layers.1.self"})
    ]
    assert whole[0]["heal"] == whole[1]["heal"] > 0  # all sites are trained again


def test_several_processes_share_the_passes(readable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = told(readable, heal=True)
    monkeypatch.setattr(stages, "num_processes", lambda: 2)
    two = told(readable, heal=True)
    for stage in ("refit", "heal"):
        assert two[stage] == pytest.approx(one[stage] / 2, abs=1e-2)
    assert {"plan", "write", "verify"} <= {stage for stage in one if one[stage] == two[stage]}


def test_the_rate_is_measured_for_long_work_alone(readable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def rate(*place: Any) -> float:
        asked.append(place)
        return 2e10

    monkeypatch.setattr(stages, "product_rate", rate)
    short = told(readable, tokens=2**10)
    assert asked == []
    monkeypatch.setattr(stages, "MEASURED_FROM", 1.0)
    assert told(readable, tokens=2**10)["refit"] == pytest.approx(short["refit"] / 2, abs=1e-3)
    assert set(asked) == {(64, "cpu", torch.float32)}
    asked.clear()
    told(readable, merge="mean", refit=False, verifies=False)
    assert asked == []


def test_a_rate_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.08, 0.2])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    rate = machine.product_rate.__wrapped__(16, "cpu", torch.float32)
    assert rate == pytest.approx(2 * 2 * machine.ROWS * 16 * 16 / 0.2)  # two of them in 0.2 s


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({"calibrate": 5.2, "refit": 30.4, "write": 0.6, "verify": 4}, "about 40 s: calibrate 5, refit 30, verify 4"),
        ({"calibrate": 119}, "about 119 s: calibrate 119"),
        ({"calibrate": 130, "refit": 620, "heal": 20, "write": 0.2}, "about 13 min: calibrate 2, refit 10, heal 0"),
        ({"calibrate": 1800, "refit": 9000}, "about 3.0 h: calibrate 0.5, refit 2.5"),
        ({"write": 0.1}, "about 0 s"),
        ({}, "about 0 s"),
    ],
)
def test_estimates_are_told_in_a_unit_of_their_size(seconds: dict[str, float], words: str) -> None:
    assert estimate(seconds) == words


def test_what_cannot_be_counted_does_not_stop_a_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise ZeroDivisionError

    folded = dict(kv_heads=4, merge="mean", group="contiguous", refit=False)
    monkeypatch.setattr("headfold.conversion.estimate.arithmetic", fails)
    found = headfold.fold(tiny_checkpoint("llama", torch.float32), tmp_path / "a", **folded)
    assert [*found.estimated_seconds] == ["write"]
    monkeypatch.setattr(fold_job, "estimated_seconds", fails)
    found = headfold.fold(tiny_checkpoint("llama", torch.float32), tmp_path / "b", **folded)
    assert found.estimated_seconds == {} and found.seconds
    assert "estimated" not in (tmp_path / "b" / "README.md").read_text()


def test_a_fold_tells_its_estimate_and_records_it(
    readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, out = tmp_path / "stats.safetensors", tmp_path / "out"
    sample, opened = {"input_ids": tiny_tokens(8, 32)}, open_source(readable, False)
    seen = collect(stock_model(readable, torch.float32), opened.sites, sample)
    drawn = {"kind": "text", "source": "stdlib", "seed": "0", "tokens": "256", "context": "32"}
    write_stats(stats, seen, {"model": opened.checkpoint.fingerprint(), **drawn}, sample)
    said: list[str] = []
    monkeypatch.setattr(fold_job, "SAID_FROM", 0.0)
    found = headfold.fold(readable, out, kv_heads=4, stats=stats, say=said.append)
    assert [*found.estimated_seconds] == ["plan", "refit", "write", "verify"]
    assert all(0 <= seconds < 20 for seconds in found.estimated_seconds.values()) and found.estimated_seconds["refit"]
    assert said == [f"fold: {estimate(found.estimated_seconds)}"]
    card = (out / "README.md").read_text()
    assert f"; estimated before: {estimate(found.estimated_seconds)}\n" in card and "- Time: " in card
    for stage in found.seconds:
        assert f"{stage} " in card.partition("- Time: ")[2].partition(";")[0]


def test_the_command_line_prints_it_in_json_or_on_stderr(readable: Path, tmp_path: Path, monkeypatch) -> None:
    words = ["fold", str(readable), "--kv-heads", "4", "--merge", "mean", "--group", "contiguous", "--no-refit"]
    ran = CliRunner().invoke(app, [*words[:2], str(tmp_path / "a"), *words[2:], "--json"])
    assert ran.exit_code == 0, ran.output
    assert [*json.loads(ran.stdout)["estimated_seconds"]] == ["write", "verify"]
    ran = CliRunner().invoke(app, [*words[:2], str(tmp_path / "b"), *words[2:]])
    assert "about" not in ran.output  # short work is not announced
    monkeypatch.setattr(fold_job, "SAID_FROM", 0.0)
    ran = CliRunner().invoke(app, [*words[:2], str(tmp_path / "c"), *words[2:]])
    assert ran.stderr.startswith("fold: about 0 s\n") and "about" not in ran.stdout
