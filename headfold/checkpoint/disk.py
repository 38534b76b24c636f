"""Errors of the disk in one line: full, read-only, no permission."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..core.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write here",
    errno.EPERM: "no permission to write here",
    errno.EEXIST: "a file is in the way",
    errno.EISDIR: "a directory is in the way",
    errno.ENOTDIR: "part of the path is a file, not a directory",
    errno.ELOOP: "a symbolic link is in the way",
    errno.EFBIG: "the file is too large for this file system",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}

_TEMPORARY = ".headfold-partial"


def reason(error: OSError) -> str:
    """Return what an error means that only writing can have; an empty text for others."""
    return _REASONS[error.errno] if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else ""


@contextmanager
def disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an error of the user's disk into a `UserError` that names `path` and the bytes needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        needed = "" if num_bytes is None else f"; expected room for {sizes(num_bytes)}"
        where = error.filename or path
        raise UserError(
            f"{where}: {_REASONS[error.errno]}{needed}; choose another output place or make room there"
        ) from error


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Do the same for the errors that the writers of torch and safetensors raise in their own types."""
    try:
        with disk_errors(path):
            yield
    except (SafetensorError, RuntimeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not re.search(r"inline_container|PytorchStreamWriter|iostream|os error|I/O error", said):
            raise
        raise UserError(
            f"{path}: cannot be written ({said}); is the disk full? Choose another output place or make room there"
        ) from error


def require_space(path: Path, num_bytes: int) -> None:
    """Check that `num_bytes` more fit on the disk, before anything is written.

    Raises:
        UserError: there is less free space.
    """
    free = shutil.disk_usage(path).free
    if free < num_bytes:
        raise UserError(
            f"{path}: the disk is too full: expected room for {sizes(num_bytes)}, got {sizes(free)} free; "
            "choose another output place or make room there"
        )


def sizes(num_bytes: int) -> str:
    """Return `1234567 bytes (1.2 MB)`: the exact number and a rounded one."""
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{num_bytes} bytes" if unit == 0 else f"{num_bytes} bytes ({value:.1f} {'kMGT'[unit - 1]}B)"


def temporary_beside(path: Path) -> Path:
    """Return the file that is written before it replaces `path`; its name is no user's, so nothing of theirs is overwritten."""
    return path.with_name(f".{path.name}{_TEMPORARY}")


def is_temporary(path: Path) -> bool:
    """Return whether a file is one of those, which a kill may have left."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


@contextmanager
def replacing(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield the place of a new file, empty so far, that replaces `path` when the body has written it; an error leaves `path` as it was.

    Raises:
        UserError: the place is full or cannot be written to.
    """
    if not path.parent.exists():  # "a/../b" would otherwise leave a directory `a`
        path = Path(os.path.abspath(path))
    temporary = temporary_beside(path)
    with disk_errors(path, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Removed and created, never opened: in a directory that others share, a link may have been put there.
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors puts a file of its own there, which only its owner can read
            flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the file's bytes, or the directory's entries, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
