"""One run at a time writes to an output place, until it releases it or ends."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_models import EVEN, SHUFFLED, grouped
from owners import refused_while_owned
from test_cli import model, run  # noqa: F401 - fixtures
from tiny import tiny_checkpoint

import headfold
from headfold import parallel
from headfold.checkpoint import staging
from headfold.checkpoint.ownership import Claim, claim, lock_beside, lock_inside
from headfold.core.errors import AlreadyFinished, UserError
from headfold.outputs import owned_directory, owned_file, staged
from headfold.verbs import fold as verb

# ruff: noqa: F811 - fixtures are arguments

BASELINE: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False, verify=False)
OWNER = """
import os, sys, time
from pathlib import Path
from headfold.checkpoint.ownership import claim, lock_beside
out = Path(sys.argv[1])
owned = claim(out, lock_beside(out))
if not os.fork():
    # Only once it is out of the fork has it dropped the lock.
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def source() -> Path:
    return tiny_checkpoint("llama", torch.float32)


def own(out: Path) -> Claim:
    return claim(out, lock_beside(out))


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_lock_ends_with_its_process_even_if_a_child_lives_on(out: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(out)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {owner.pid} on {socket.gethostname()} since 2"):
            own(out)
        owner.kill()
        owner.wait()
        own(out).release()
        assert list(out.parent.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)
        owner.kill()
        owner.wait()
        owner.stdout.close()


def test_of_two_folds_to_one_place_the_second_is_refused_and_the_first_is_whole(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins in the middle of the first, with the same settings or others."""
    refusals, write = [], verb.write_fold

    def interrupted(*given: Any) -> Any:
        for kv_heads in (2, 4):
            with pytest.raises(UserError, match="other run that writes there") as refusal:
                headfold.fold(source, out, **{**BASELINE, "kv_heads": kv_heads})
            refusals.append(refusal)
        return write(*given)

    monkeypatch.setattr(verb, "write_fold", interrupted)
    headfold.fold(source, out, **BASELINE)
    monkeypatch.undo()
    headfold.fold(source, out.with_name("calm"), **BASELINE)
    assert len(refusals) == 2 and sorted(path.name for path in out.parent.iterdir()) == ["calm", "out"]
    calm = {path.name: path.read_bytes() for path in out.with_name("calm").iterdir() if path.suffix != ".md"}
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".md"} == calm


def test_a_fold_and_an_export_are_refused_while_another_run_owns_their_place(source: Path, out: Path) -> None:
    refused_while_owned(lambda: headfold.fold(source, out, **BASELINE), out, lock_beside(out))
    folded = out.with_name("folded")
    grouped("llama", [EVEN, SHUFFLED], folded)
    refused_while_owned(lambda: headfold.export(folded, out), out, lock_beside(out))
    headfold.export(folded, out, verify=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, None])
def test_a_place_is_given_up_however_its_owner_ends(out: Path, error: type[BaseException] | None) -> None:
    for _ in range(2):
        try:
            with staged(out, "key", False) as staging:
                assert staging.exists() and lock_beside(out).exists()
                if error is not None:
                    raise error
        except (KeyboardInterrupt, UserError):
            pass
        assert not lock_beside(out).exists() and not list(out.parent.glob(".*"))


def test_threads_of_one_process_exclude_each_other(out: Path) -> None:
    found: list[BaseException] = []

    def attempt() -> None:
        try:
            own(out)
        except UserError as error:
            found.append(error)

    owner = own(out)
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    owner.release()
    assert len(found) == 1


def test_a_lock_that_its_last_owner_removes_meanwhile_is_made_anew(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flock, removed = lock_beside(out), fcntl.flock, []

    def after_removal(descriptor: int, how: int) -> None:
        if not removed:
            lock.unlink()
            removed.append(lock)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    owner = own(out)
    assert removed and owner.descriptor is not None and os.stat(lock).st_ino == os.fstat(owner.descriptor).st_ino
    with pytest.raises(UserError, match="other run"):
        own(out)
    owner.release()


def test_a_lock_that_is_a_link_is_not_followed(out: Path) -> None:
    precious = out.with_name("precious")
    precious.write_text("years of work")
    lock_beside(out).symlink_to(precious)
    with pytest.raises(UserError, match="symbolic link"):
        own(out)
    assert precious.read_text() == "years of work"


def test_without_locks_the_record_of_a_living_process_holds(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flock = lock_beside(out), fcntl.flock
    monkeypatch.setattr(fcntl, "flock", no_locks)
    owner = own(out)
    assert owner.descriptor is None
    for locking in (no_locks, flock):  # a host whose mount has locks sees the record too
        monkeypatch.setattr(fcntl, "flock", locking)
        with pytest.raises(UserError, match=f"process {os.getpid()} .* remove {lock}"):
            own(out)
    owner.release()
    assert list(out.parent.iterdir()) == []
    own(out).release()


@pytest.mark.parametrize(
    ("change", "is_dead"),
    [({"pid": 2**22 + 1}, True), ({"started": "1"}, True), ({"host": "elsewhere"}, False), ({}, False)],
)
def test_without_locks_a_dead_owner_is_followed_and_a_distant_one_is_not(
    out: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], is_dead: bool
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = lock_beside(out)
    record = dict(own(out).record)
    lock.write_text(json.dumps(record | change))
    if is_dead:
        assert own(out).record["pid"] == os.getpid()
    else:
        with pytest.raises(UserError, match="if no such run exists any more, remove"):
            own(out)
        assert json.loads(lock.read_text()) == record | change
    assert [path.name for path in out.parent.iterdir()] == [lock.name]


def test_without_locks_a_zombie_is_dead_and_two_claims_take_turns(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = lock_beside(out)
    record = dict(own(out).record)
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None and zombie.stdout.read() == b""
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    started = Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[19]
    lock.write_text(json.dumps(record | {"pid": zombie.pid, "started": started}))
    turn = lock.with_name(f"{lock.name}-turn")
    turn.touch()
    with pytest.raises(UserError, match=f"one that just began.* remove {turn}"):
        own(out)
    turn.unlink()
    assert own(out).record["pid"] == os.getpid()
    zombie.wait()
    zombie.stdout.close()


def test_a_directory_that_stays_empty_goes_and_the_users_own_stays(out: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), owned_directory(out):
            assert lock_inside(out).exists()
            raise KeyboardInterrupt
        assert not out.exists()
    out.mkdir()
    with owned_directory(out):
        pass
    assert list(out.iterdir()) == []


def test_the_command_line_refuses_a_second_run_and_ends_well_where_nothing_is_left_to_do(
    run: Any, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("fold", model, out, "--kv-heads", 2, "--merge", "mean", "--group", "contiguous", "--no-refit")
    owner = own(out)
    refused = run(*words)
    owner.release()
    assert refused.code == 2 and refused.out == "" and len(refused.err.splitlines()) == 1
    assert f"process {os.getpid()} on" in refused.err and list(out.parent.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_clear_up", killed)
        with pytest.raises(KeyboardInterrupt):
            headfold.fold(model, out, kv_heads=2, merge="mean", group="contiguous", refit=False)
    assert (out / staging.JOB).exists()
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.name != staging.JOB}
    again = run(*words)
    assert again.code == 0 and len(again.err.splitlines()) == 1 and "nothing is left to do" in again.err, again.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_ends_well_where_nothing_is_left_to_do(
    rank: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> None:
        raise AlreadyFinished("finished")

    sent: list[Any] = []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "_alone", contextlib.nullcontext)
    monkeypatch.setattr(parallel, "_broadcast", lambda said: sent.append(said) or (None, "finished", True))
    with pytest.raises(AlreadyFinished, match="finished"):
        parallel.on_main(opened)
    assert rank or sent == [(None, "finished", True)]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_statistics_and_plans_leave_the_users_files_alone(run: Any, model: Path, tmp_path: Path) -> None:
    for name in ("x.partial", "y.json.partial"):
        (tmp_path / name).write_text("mine")
    text = model.parent / "text.txt"
    assert run("calibrate", model, tmp_path / "x", "--calibration", text, "--tokens", 256).code == 0
    assert run("plan", model, tmp_path / "y.json", "--kv-heads", 2, "--stats", tmp_path / "x").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.partial", "y.json", "y.json.partial"]
    assert {(tmp_path / name).read_text() for name in ("x.partial", "y.json.partial")} == {"mine"}


def test_a_lock_that_a_kill_left_beside_a_whole_file_is_removed_by_the_run_that_is_refused(tmp_path: Path) -> None:
    file, lock = tmp_path / "out.gguf", tmp_path / ".out.gguf.headfold-lock"
    file.write_text("whole")
    lock.write_text("")
    with pytest.raises(UserError, match="--force"), owned_file(file, force=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_lock_that_a_kill_left_beside_whole_statistics_is_removed(run: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    file.write_text("whole")
    lock_beside(file).write_text("")
    refused = run("calibrate", model, file, "--calibration", model.parent / "text.txt", "--tokens", 256)
    assert refused.code == 2 and "--force" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["made.safetensors"]


def test_a_disk_too_full_for_the_lock_leaves_none(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="the disk is full"):
        own(out)
    assert not lock_beside(out).exists()
