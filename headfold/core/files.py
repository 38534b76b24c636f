"""Files that a user names, before they are opened: a FIFO blocks whoever opens it, and a device may have no end."""

import hashlib
import stat
from pathlib import Path

from .errors import UserError


def regular_file(path: Path, expected: str) -> Path:
    """Return the path of a file that a user names, after checking that it is a regular file or a link to one.

    Raises:
        UserError: there is none, or it is a directory, a FIFO, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        absent = isinstance(error, FileNotFoundError)
        reason = "no such file" if absent else getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: expected {expected}, got {reason}; check the path") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: expected {expected}, got {kind_of_file(mode)}; give a regular file")
    return path


def kind_of_file(mode: int) -> str:
    """Return what kind of file has this `st_mode`, in words."""
    kinds = {"a directory": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a file": stat.S_ISREG}
    return next((kind for kind, holds in kinds.items() if holds(mode)), "a device")


def file_digest(name: str | None) -> str | None:
    """Return a digest of a file's contents, so that rows of other data are told apart; None for what is no single file."""
    path = Path(name.partition(":")[0]) if name else None
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
