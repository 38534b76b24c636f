"""Copies of bytes: file to tensor, tensor to file, and file to file without passing through this process."""

import ctypes
import errno
import os
from collections.abc import Callable

from torch import Tensor

CHUNK = 64 * 2**20
"""Bytes copied per system call: enough to make its cost negligible, few enough to stop or report between two."""

_BUFFER = 2**17
"""Bytes per read where only reading and writing is supported: longer pieces fall out of the cache in between."""

UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EBADF, errno.EPERM}
"""Errors of system calls that do not work on these files; another way may."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes, valid while the tensor lives."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    view = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr() or 1)
    return memoryview(view).cast("B")


def expect(descriptor: int, start: int, count: int) -> None:
    """Ask the kernel to read this part of a file ahead, and return at once; does nothing where that is not supported."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_WILLNEED)


def read_into(descriptor: int, memory: memoryview, offset: int) -> int:
    """Fill `memory` from the file at `offset`; return the bytes read, fewer only where the file ends."""
    expect(descriptor, offset, len(memory))
    done = 0
    while done < len(memory):
        step = os.preadv(descriptor, [memory[done:]], offset + done)
        if step == 0:
            break
        done += step
    return done


def write_all(descriptor: int, memory: memoryview | bytes, offset: int) -> None:
    """Write all of `memory` at `offset`, in as many calls as the kernel needs."""
    memory = memoryview(memory)
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], offset + done)


def copy_range(source: int, target: int, start: int, place: int, count: int, report: Callable[[int], None]) -> None:
    """Copy `count` bytes from `start` of one open file to `place` in another, by the first way that the kernel and the file
    systems support: `copy_file_range` (shares blocks where it can), `sendfile`, reading and writing.

    `report` is called with the size of every piece; an exception from it stops the copy.

    Raises:
        EOFError: the source is shorter than `start + count`.
    """
    ways = [_copy_file_range, _sendfile, _read_write]
    expect(source, start, CHUNK)
    done = 0
    while done < count:
        # The disk reads the next piece while this one is copied: without, a cold source takes more than twice as long.
        expect(source, start + done + CHUNK, CHUNK)
        step = _try(ways[0], source, target, start + done, place + done, min(CHUNK, count - done))
        if step == 0 and len(ways) == 1:
            raise EOFError(f"the file ends at byte {start + done}, expected {start + count}")
        if step == 0:
            ways.pop(0)
            continue
        done += step
        report(step)


def _try(
    way: Callable[[int, int, int, int, int], int], source: int, target: int, start: int, place: int, count: int
) -> int:
    """Return the bytes copied, 0 if this way is not supported here."""
    try:
        return way(source, target, start, place, count)
    except OSError as error:
        if way is _read_write or error.errno not in UNSUPPORTED:
            raise
        return 0


def _copy_file_range(source: int, target: int, start: int, place: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source, target, count, start, place)


def _sendfile(source: int, target: int, start: int, place: int, count: int) -> int:
    os.lseek(target, place, os.SEEK_SET)
    return os.sendfile(target, source, start, count)


def _read_write(source: int, target: int, start: int, place: int, count: int) -> int:
    piece = os.pread(source, min(_BUFFER, count), start)
    write_all(target, piece, place)
    return len(piece)
