"""A fold says so where its calibration was too small for its inputs."""

from pathlib import Path

import pytest

import headfold
from headfold.stats_file import StatsFile

BUNDLED = Path(headfold.__file__).parent / "bundled"


@pytest.mark.parametrize(("tokens", "is_narrow"), [(1024, True), (8192, False)])
def test_few_positions_per_dim_are_named(tokens: int, is_narrow: bool, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    headfold.calibrate(BUNDLED, stats, calibration=str(BUNDLED / "heldout.txt"), tokens=tokens)
    measured = StatsFile(stats)
    site = next(iter(measured))
    dims = measured[site].tensors["second"].shape[0] - 1
    assert measured.positions_per_dim(site) == measured[site].count / dims
    result = headfold.fold(BUNDLED, tmp_path / "out", kv_heads=2, stats=stats, refit=False, verify=False)
    assert any("calibration is narrow" in note and site in note for note in result.notes) == is_narrow
