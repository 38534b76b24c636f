"""A large file that is written past the page cache where the system supports it.

Most of the time of a buffered copy of a checkpoint goes into new cache pages for data that is not read again soon, and they
displace other programs' pages. Whole pages are therefore written directly to the disk (O_DIRECT), from the source's cached pages
or, if it is not cached, read directly from the disk too; if the file system can share blocks, nothing is copied at all.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

from .transfer import UNSUPPORTED, copy_range, read_into, write_all

PAGE = 4096
"""Bytes; a multiple of the alignment that any disk requires for direct transfers."""
DIRECT_BYTES = 2**28
"""Smaller files stay in the page cache: they fit, and a verification reads them next."""
CHUNK = 2**23
"""Bytes per direct transfer, and of the buffer of each thread."""

_FICLONERANGE = 0x4020940D
"""ioctl_ficlonerange(2): `struct { int64 source; uint64 start, count, place }`."""


class Source:
    """A file to copy from, in several threads."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self._direct = _open_direct(path, os.O_RDONLY)

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill `memory`: cached pages from the cache, the rest past it if offset and memory are aligned to pages.

        Raises:
            EOFError: the file is shorter.
        """
        done = _read_cached(self.descriptor, memory, offset)
        if self._direct is not None and (offset + done) % PAGE == 0 and (len(memory) - done) % PAGE == 0:
            done += _read_direct(self._direct, memory[done:], offset + done)
        done += read_into(self.descriptor, memory[done:], offset + done)
        if done < len(memory):
            end = os.fstat(self.descriptor).st_size
            raise EOFError(f"the file ends at byte {end}, expected {offset + len(memory)}")

    def close(self) -> None:
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Target:
    """A file of known size that several threads write in any order, each byte once.

    Parts of pages at the edges of direct writes are kept in memory until `close`, because two writers may share a page.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._edges: list[tuple[int, bytes]] = []
        self._direct: int | None = None
        try:
            os.ftruncate(self._descriptor, size)
        except OSError:
            os.close(self._descriptor)
            raise
        if size >= DIRECT_BYTES:
            self._direct = _open_direct(path, os.O_WRONLY)

    @property
    def is_direct(self) -> bool:
        return self._direct is not None

    def write(self, memory: memoryview | bytes, offset: int) -> None:
        """Write all of `memory` at `offset`."""
        memory = memoryview(memory)
        if self._direct is None:
            write_all(self._descriptor, memory, offset)
            return
        head, body = _whole_pages(offset, len(memory))
        self._edges += [(offset, bytes(memory[:head])), (offset + head + body, bytes(memory[head + body :]))]
        buffer = _buffer(body)
        for start in range(head, head + body, CHUNK):
            piece = buffer[: min(CHUNK, head + body - start)]
            piece[:] = memory[start : start + len(piece)]
            self._write_pages(piece, offset + start)

    def copy(self, source: Source, start: int, place: int, count: int, report: Callable[[int], None]) -> None:
        """Copy `count` bytes from `start` in the source to `place` in this file; `report` is called with the size of every piece.

        Raises:
            EOFError: the source is shorter than `start + count`.
        """
        if self._direct is None:
            copy_range(source.descriptor, self._descriptor, start, place, count, report)
            return
        head, body = _whole_pages(place, count)
        for edge, length in ((0, head), (head + body, count - head - body)):
            memory = bytearray(length)
            source.read(memoryview(memory), start + edge)
            self._edges.append((place + edge, bytes(memory)))
        report(count - body)
        if body and _share_blocks(source.descriptor, self._descriptor, start + head, place + head, body):
            report(body)
            return
        buffer = _buffer(body)
        for done in range(head, head + body, CHUNK):
            piece = buffer[: min(CHUNK, head + body - done)]
            source.read(piece, start + done)
            self._write_pages(piece, place + done)
            report(len(piece))

    def close(self) -> None:
        """Write the edges, and wait until everything is on the disk."""
        for offset, edge in self._edges:
            write_all(self._descriptor, edge, offset)
        os.fsync(self._descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Close without waiting for the disk; has no effect after `close`."""
        descriptors, self._descriptor, self._direct = (self._descriptor, self._direct), -1, None
        for descriptor in descriptors:
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)

    def _write_pages(self, memory: memoryview, offset: int) -> None:
        try:
            assert self._direct is not None
            write_all(self._direct, memory, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The disk requires other alignments, or a write ended within a page: the cache accepts both.
            write_all(self._descriptor, memory, offset)


def _open_direct(path: Path, flags: int) -> int | None:
    """Return a descriptor for direct transfers; None if the system or this file system has none."""
    try:
        return os.open(path, flags | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None


def _whole_pages(offset: int, count: int) -> tuple[int, int]:
    """Return the bytes before the first whole page of this range, and the bytes in whole pages."""
    head = min(-offset % PAGE, count)
    return head, (count - head) // PAGE * PAGE


def _buffer(count: int) -> memoryview:
    """Return memory aligned to pages."""
    return memoryview(mmap.mmap(-1, max(PAGE, min(CHUNK, count))))


def _read_cached(descriptor: int, memory: memoryview, offset: int) -> int:
    """Return the number of bytes, in whole pages, that were read without waiting for the disk."""
    if not hasattr(os, "RWF_NOWAIT") or len(memory) < PAGE:
        return 0
    try:
        return os.preadv(descriptor, [memory], offset, os.RWF_NOWAIT) // PAGE * PAGE
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EAGAIN}:
            raise
        return 0


def _read_direct(descriptor: int, memory: memoryview, offset: int) -> int:
    """Return the number of bytes read, fewer where the file ends or this disk requires other alignments."""
    done = 0
    try:
        while done < len(memory) and (step := os.preadv(descriptor, [memory[done:]], offset + done)):
            done += step
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return done


def _share_blocks(source: int, target: int, start: int, place: int, count: int) -> bool:
    """Let both files share the same blocks; return False if the file system cannot, or the two offsets are aligned differently."""
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, start, count, place))
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.ENOTTY, errno.EISDIR, errno.ETXTBSY}:
            raise
        return False
    return True
