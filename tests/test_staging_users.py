"""Staging among other users: what they may have written is not taken over, and what is written has the user's permissions."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import one_line
from safetensors.torch import save_file

from headfold.checkpoint import staging
from headfold.core.errors import UserError
from headfold.stats_file import write_stats


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("place", ["out.partial", "out"])
@pytest.mark.parametrize("whose", ["another user's", "every user may write"])
def test_what_others_may_have_written_is_not_gone_on_from(
    whose: str, place: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / place
    planted.mkdir()
    (planted / staging.JOB).write_text("key" + (" finished" if finished else ""))
    (planted / "model.safetensors").write_text("of another")
    if whose == "another user's":
        monkeypatch.setattr(Path, "stat", _as_of_another(Path.stat, planted))
    else:
        planted.chmod(0o777)
    with pytest.raises(UserError) as error:
        staging.open_staging(tmp_path / "out", "key", False)
    one_line(error, planted, whose, "remove it")
    assert (planted / "model.safetensors").exists() and (place == "out" or not (tmp_path / "out").exists())


def _as_of_another(real: Callable[..., os.stat_result], planted: Path) -> Callable[..., object]:
    def stat(path: Path, **keywords: bool) -> object:
        found = real(path, **keywords)
        if path != planted:
            return found
        return SimpleNamespace(st_uid=found.st_uid + 1, st_mode=found.st_mode)

    return stat


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_is_written_has_the_users_permissions(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):  # begun anew, and gone on with
            place = staging.open_staging(tmp_path / "out", "key", False)
            assert place.stat().st_mode & 0o777 == 0o777 & ~umask
        staging.write_json(place / "file.json", {})
        write_stats(place / "stats", {}, {})
        save_file({"x": torch.ones(1)}, place / "model.safetensors")
        write_stats(tmp_path / "stats", {}, {"x": "y"}, {"x": torch.ones(1)})
        staging.commit(place, tmp_path / "out", False)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
        files = [tmp_path / "stats", *(tmp_path / "out").iterdir()]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    finally:
        os.umask(before)


def test_a_directory_that_only_another_user_may_rename_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "out").mkdir()
    assert staging.open_staging(shared / "out", "key", False)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for force in (False, True):
        with pytest.raises(UserError) as error:
            staging.open_staging(shared / "out", "key", force)
        one_line(error, shared / "out", "another user's")
