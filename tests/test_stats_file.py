"""Laws of the statistics file: it gives back what was written, adds up, and refuses in one line."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise
from safetensors.torch import load_file, save_file

from headfold import stats_file
from headfold.checkpoint.headers import read_header
from headfold.core.errors import UserError
from headfold.core.stats import SiteStats
from headfold.stats_file import StatsFile, add_stats, write_stats, writing_stats


def stats(seed: int) -> dict[str, SiteStats]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"second": (5, 5), "scatter": (4, 4)}
    drawn = [{n: torch.rand(s, dtype=torch.float64, generator=generator) for n, s in shapes.items()} for _ in range(3)]
    return {f"layers.{site}.self": SiteStats(tensors, 10 * site + seed + 1) for site, tensors in enumerate(drawn)}


def test_statistics_come_back_bitwise_and_add(tmp_path: Path) -> None:
    one, two = stats(1), stats(2)
    write_stats(tmp_path / "a.safetensors", one, {"source": "text"})
    write_stats(tmp_path / "b.safetensors", two, {})
    a, b = StatsFile(tmp_path / "a.safetensors"), StatsFile(tmp_path / "b.safetensors")
    assert dict(a.metadata) == {"source": "text"} and list(a) == list(one) and len(a) == 3
    total = add_stats(a, b)
    for site in one:
        assert a[site].count == one[site].count and total[site].count == one[site].count + two[site].count
        for name, tensor in one[site].tensors.items():
            assert_bitwise(a[site].tensors[name], tensor)
            assert_bitwise(total[site].tensors[name], tensor + two[site].tensors[name])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_statistics_refuse_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    write_stats(path, stats(0), {})
    with pytest.raises(UserError) as error:
        StatsFile(path)["layers.3.self"]
    one_line(error, "stats.safetensors", "layers.3.self", "3 sites", "headfold calibrate")
    with pytest.raises(UserError) as error:
        StatsFile(tmp_path / "none.safetensors")
    one_line(error, "none.safetensors", "no such file")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    for name in ("junk", "other"):
        with pytest.raises(UserError) as error:
            StatsFile(tmp_path / f"{name}.safetensors")
        one_line(error, name, "headfold calibrate")
    other = dict(list(stats(0).items())[:2])
    write_stats(tmp_path / "two.safetensors", other, {})
    for pair in ((path, tmp_path / "two.safetensors"), (tmp_path / "two.safetensors", path)):
        with pytest.raises(UserError, match="no statistics for layers.2.self"):
            add_stats(*map(StatsFile, pair))


def test_statistics_on_a_full_disk_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.safetensors"
    write_stats(path, stats(0), {})
    before = path.read_bytes()

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stats_file, "write_all", refuse)
        with pytest.raises(UserError) as error:
            write_stats(path, stats(1), {})
        one_line(error, path, "the disk is full")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(UserError) as error:
        write_stats(path, stats(1), {})
    one_line(error, tmp_path, "100 bytes")
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["stats.safetensors"]


def test_calibration_tokens_travel_with_the_statistics(tmp_path: Path) -> None:
    windows = torch.arange(12).view(3, 4)
    sites = {"a": SiteStats({name: torch.eye(3, dtype=torch.float64) for name in ("second", "scatter")}, 5)}
    write_stats(tmp_path / "with.safetensors", sites, {}, {"input_ids": windows})
    write_stats(tmp_path / "without.safetensors", sites, {})
    found = StatsFile(tmp_path / "with.safetensors")
    assert torch.equal(found.sample()["input_ids"], windows) and list(found) == ["a"]
    assert StatsFile(tmp_path / "without.safetensors").sample() is None


def test_a_file_that_grows_site_by_site_is_the_file_written_at_once(tmp_path: Path) -> None:
    """Also where sums are replaced, and where statistics that were announced never come."""
    sites, sample = stats(3), {"mask": torch.ones(3, 3, dtype=torch.bool), "input_ids": torch.arange(9).view(3, 3)}
    announced = {site: {"second": (5, 5), "scatter": (4, 4), "attended": (2, 70)} for site in sites}
    grown, whole = tmp_path / "grown.safetensors", tmp_path / "whole.safetensors"
    with writing_stats(grown, announced, {"model": "x"}, sample) as writer:
        for drawn in (stats(4), sites):
            for site, sums in drawn.items():
                writer.put(site, sums)
        for site, sums in sites.items():
            found = writer.get(site)
            assert found is not None and found.count == sums.count and found.tensors.keys() == sums.tensors.keys()
        assert writer.get("layers.9.self") is None and not grown.exists()
    write_stats(whole, sites, {"model": "x"}, sample)
    assert load_file(grown).keys() == load_file(whole).keys()
    for name, tensor in load_file(whole).items():
        assert_bitwise(load_file(grown)[name], tensor)
    assert StatsFile(grown).metadata == StatsFile(whole).metadata and list(StatsFile(grown)) == list(sites)
    assert grown.read_bytes().endswith(whole.read_bytes()[-100:])  # the calibration data


def test_every_tensor_begins_where_its_numbers_may(tmp_path: Path) -> None:
    """Readers map files into memory, where a number of eight bytes lies at a multiple of eight."""
    dtypes = [torch.bool, torch.float32, torch.bfloat16, torch.float64, torch.int64]
    sample = {str(dtype): torch.ones(3, dtype=dtype) for dtype in dtypes}
    write_stats(tmp_path / "x.safetensors", stats(1), {}, sample)
    found = read_header(tmp_path / "x.safetensors").tensors
    assert len(found) == 6 + len(sample) and all(info.start % info.dtype.itemsize == 0 for info in found.values())
