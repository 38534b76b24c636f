"""Laws of large files: past the page cache or through it, shared or moved, the bytes are the same."""

import errno
import fcntl
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Fold, contents, save, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headfold.checkpoint import target as target_module
from headfold.checkpoint import writer
from headfold.checkpoint.reader import Checkpoint
from headfold.checkpoint.target import PAGE, Source, Target

SIZE = 7 * PAGE + 123
DATA = random.Random(0).randbytes(SIZE)


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also the smallest, and in several transfers each."""
    monkeypatch.setattr(target_module, "DIRECT_BYTES", 0)
    monkeypatch.setattr(target_module, "CHUNK", 2 * PAGE)
    monkeypatch.setattr(writer, "PIECE", 3 * PAGE)
    probe = Target(tmp_path / "probe", PAGE)
    direct = probe.is_direct
    probe.close()
    if not direct:
        pytest.skip(f"{tmp_path}: this file system has no direct transfers")


def refusing(call: Callable, when: Callable[..., bool], code: int) -> Callable:
    """`call`, but for some arguments an error."""

    def wrapped(*arguments: object) -> object:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return call(*arguments)

    return wrapped


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch


def without_cached_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT")


def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", refusing(os.preadv, lambda *a: len(a) == 4, errno.EAGAIN))


def strict_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cached_reads(monkeypatch)
    monkeypatch.setattr(os, "preadv", refusing(os.preadv, lambda fd, *_: is_direct(fd), errno.EINVAL))


def strict_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite, lambda fd, *_: is_direct(fd), errno.EINVAL))


def no_direct_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", refusing(os.open, lambda path, flags, *_: bool(flags & os.O_DIRECT), errno.EINVAL))


def shared_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that clones whole blocks, as ioctl_ficlonerange(2) describes."""

    def clone(target: int, request: int, argument: bytes) -> int:
        source, start, count, place = struct.unpack("=qQQQ", argument)
        assert request == 0x4020940D and count > 0
        if (start | place | count) % PAGE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with open(f"/proc/self/fd/{target}", "r+b") as file:
            os.pwrite(file.fileno(), os.pread(source, count, start), place)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)


SYSTEMS = [
    as_it_is,
    without_cached_reads,
    nothing_is_cached,
    strict_reads,
    strict_writes,
    no_direct_files,
    shared_blocks,
]

_NEAR_PAGES = st.builds(lambda page, off: page * PAGE + off, st.integers(0, 7), st.integers(-2, 2)) | st.integers(
    0, SIZE
)
_CUTS = st.lists(_NEAR_PAGES.filter(lambda cut: 0 <= cut <= SIZE), max_size=6)


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=_CUTS, shift=st.sampled_from([0, PAGE, 1, 8]), order=st.randoms(use_true_random=False))
def test_parts_in_any_order_make_the_whole(
    tmp_path: Path, system: Callable, cuts: list[int], shift: int, order: random.Random
) -> None:
    (tmp_path / "source").write_bytes(b"x" * shift + DATA)
    edges = [0, *sorted(cuts), SIZE]
    parts = list(zip(edges, edges[1:], strict=False))
    order.shuffle(parts)
    heard: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch, Source(tmp_path / "source") as source:
        system(monkeypatch)
        target = Target(tmp_path / "target", SIZE)
        for start, end in parts:
            if order.random() < 0.5:
                target.write(DATA[start:end], start)
                heard.append(end - start)
            else:
                target.copy(source, start + shift, start, end - start, heard.append)
        target.close()
    assert (tmp_path / "target").read_bytes() == DATA
    assert sum(heard) == SIZE


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_short_source_is_an_error(tmp_path: Path, system: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(DATA[: -PAGE - 1])
    system(monkeypatch)
    if system is shared_blocks:
        pytest.skip("a clone beyond the end is the file system's to refuse")
    with Source(tmp_path / "source") as source:
        target = Target(tmp_path / "target", SIZE)
        with pytest.raises(EOFError, match=str(SIZE - PAGE - 1)):
            target.copy(source, 0, 0, SIZE, lambda count: None)
        target.abandon()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_checkpoint_is_the_same_either_way(tmp_path: Path, system: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = weights(torch.float32) | {"large": torch.randn(9000), "larger": torch.randn(3, 7001)}
    fold = Fold(Checkpoint.open(save(tmp_path / "source", tensors, None)))
    (tmp_path / "plain").mkdir(), (tmp_path / "direct").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(target_module, "DIRECT_BYTES", 2**40)
        fold.write(tmp_path / "plain")
    system(monkeypatch)
    heard: list[int] = []
    fold.write(tmp_path / "direct", heard.append)
    assert contents(tmp_path / "direct") == contents(tmp_path / "plain")
    assert sum(heard) == (tmp_path / "direct" / "model.safetensors").stat().st_size


def test_whole_pages_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(DATA)
    seen = {True: 0, False: 0}

    def count(descriptor: int, memory: memoryview, offset: int) -> int:
        seen[is_direct(descriptor)] += len(memory)
        return write(descriptor, memory, offset)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", count)
    with Source(tmp_path / "source") as source:
        target = Target(tmp_path / "target", SIZE)
        target.copy(source, 0, 0, SIZE, lambda count: None)
        target.close()
    assert seen == {True: 7 * PAGE, False: 123}
