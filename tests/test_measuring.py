"""Statistics measured block by block: the bytes of a pass of the whole model, one site in memory, every weight read once."""

import gc
import random
import shutil
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from owners import refused_while_owned
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import TINY, readable_checkpoint, stock_model, tiny_checkpoint, tiny_sites, tiny_tokens
from torch import Tensor

import headfold
from headfold import calibration
from headfold.checkpoint.disk import temporary_beside
from headfold.checkpoint.ownership import lock_beside
from headfold.checkpoint.reader import Checkpoint
from headfold.core.errors import UserError
from headfold.core.stats import SiteStats
from headfold.hf_models import open_model, streamed
from headfold.refine import measuring
from headfold.refine.measuring import write_statistics
from headfold.stats_file import StatsFile, StatsWriter

SAMPLE = {"input_ids": tiny_tokens(11, 16, seed=2)}
"""Four batches, the last of two windows."""
BATCH_TOKENS = 48


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", BATCH_TOKENS)


def measured(path: Path, source: Path, model: Any = None, **options: Any) -> bytes:
    """The bytes of a file of statistics of a tiny model."""
    sites, tensors = [site for site, _ in tiny_sites(source)], Checkpoint.open(source).tensors
    model = stock_model(source) if model is None else model
    write_statistics(path, model, sites, SAMPLE, {"model": "tiny"}, lambda name: tensors[name].shape, **options)
    return path.read_bytes()


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Undone, models run by block again."""
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "runs_by_block", lambda *args: False)
        yield patch


@pytest.mark.parametrize("name", [name for name in TINY if name in KINDS])
def test_blocks_sum_to_the_bytes_of_the_whole_model(
    name: str, whole: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(name)
    expected = measured(tmp_path / "whole", source)
    whole.undo()
    monkeypatch.setattr(measuring, "collect", None)
    assert measured(tmp_path / "blocks", source) == expected
    # Three blocks after another run on the first two batches before they run on the others.
    monkeypatch.setattr(measuring, "HIDDEN_BYTES", 2 * BATCH_TOKENS * 8 * 48)
    assert measured(tmp_path / "portions", source) == expected


def test_some_statistics_are_the_bytes_of_the_whole_model(whole: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, second = tiny_checkpoint("llama"), frozenset({"second"})
    expected = measured(tmp_path / "whole", source, statistics=second)
    whole.undo()
    assert measured(tmp_path / "blocks", source, statistics=second) == expected
    assert set(StatsFile(tmp_path / "blocks")["layers.0.self"].tensors) == {"second", "scatter"}


def test_a_model_larger_than_memory_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = Counter[str](), streamed._Weights._read
    monkeypatch.setattr(streamed._Weights, "_read", lambda self, name: reads.update([name]) or read(self, name))
    source = tiny_checkpoint("llama", num_hidden_layers=3)
    model = open_model(source, dtype=torch.float64, memory_limit=0)
    found = measured(tmp_path / "streamed", source, model)
    first = {name for name in reads if ".layers.0." in name}
    assert {reads[name] for name in first} == {2}  # once more for the form of its output
    assert {reads[name] for name in reads.keys() - first} == {1}
    assert len(reads) == 3 * len(first) + 2  # the embedding and the last norm
    assert found == measured(tmp_path / "loaded", source)


def test_the_sums_of_one_site_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are."""
    held: list[int] = []
    put = StatsWriter.put

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) and each.shape == (49, 49) for each in gc.get_objects())

    def counted(self: StatsWriter, site: str, stats: SiteStats) -> None:
        held.append(alive() - before)  # without those that other tests keep
        put(self, site, stats)

    before = alive()

    monkeypatch.setattr(StatsWriter, "put", counted)
    source = tiny_checkpoint("llama", num_hidden_layers=4)
    measured(tmp_path / "stats", source)
    assert len(held) == 4 and set(held) == {1}


def test_what_there_is_no_room_for_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    monkeypatch.setattr(measuring, "walk", None)
    with pytest.raises(UserError, match="too full"):
        measured(tmp_path / "stats", tiny_checkpoint("llama"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"])
def test_weights_that_are_not_numbers_leave_nothing(where: str, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    model = stock_model(source)
    model.get_submodule(where).weight.data[3] = torch.nan
    with pytest.raises(UserError, match=r"^layers\.\d\.self: .*NaN"):
        measured(tmp_path / "stats", source, model)
    assert not list(tmp_path.iterdir())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_progress_counts_every_block(tmp_path: Path) -> None:
    totals, heard = list[int](), list[int]()
    measured(tmp_path / "stats", tiny_checkpoint("llama"), counted=lambda total: totals.append(total) or heard.append)
    assert totals == [sum(heard)] == [2 * SAMPLE["input_ids"].numel()] and len(heard) == 8


@pytest.fixture
def source(tmp_path: Path, tokenizer: Any) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path / "source", tokenizer)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(0).choices(string.ascii_lowercase + " ", k=900)))
    return str(path)


@pytest.mark.parametrize("old", [False, True])
def test_a_calibration_that_ends_in_the_middle_may_begin_again(
    old: bool, source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, options = tmp_path / "place", {"calibration": text, "tokens": 256, "context": 32}
    place.mkdir()
    stats, put = place / "stats.safetensors", StatsWriter.put
    if old:
        stats.write_text("old")
    for stop in (KeyboardInterrupt, OSError):
        with monkeypatch.context() as patch, pytest.raises(stop):
            sites: list[str] = []

            def stopped(self: StatsWriter, site: str, found: SiteStats, stop: Any = stop, sites: Any = sites) -> None:
                sites.append(site)
                if len(sites) == 2:
                    raise stop
                put(self, site, found)

            patch.setattr(StatsWriter, "put", stopped)
            headfold.calibrate(source, stats, force=old, **options)
        assert [path.name for path in place.iterdir()] == ["stats.safetensors"] * old
        assert not old or stats.read_text() == "old"
    temporary_beside(stats).write_text("of a run that was killed")
    headfold.calibrate(source, stats, force=old, **options)
    headfold.calibrate(source, tmp_path / "calm.safetensors", **options)
    assert [path.name for path in place.iterdir()] == ["stats.safetensors"]
    assert stats.read_bytes() == (tmp_path / "calm.safetensors").read_bytes()


def test_one_run_at_a_time_writes_a_file(source: Path, text: str, tmp_path: Path) -> None:
    """The end of one would put the half file of the other into place."""
    place = tmp_path / "place"
    place.mkdir()
    stats = place / "stats.safetensors"
    refused_while_owned(
        lambda: headfold.calibrate(source, stats, calibration=text, tokens=256, context=32), stats, lock_beside(stats)
    )
