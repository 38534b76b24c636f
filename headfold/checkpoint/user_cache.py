"""The user's cache directory, in which nothing is kept that another user could exchange."""

import os
import stat
from pathlib import Path


def cache_home() -> Path:
    """Return headfold's directory in the user's cache, created if it is missing, for its owner alone.

    Raises:
        OSError: the place cannot be written to, or other users may write there.
        RuntimeError: the user has no home directory.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headfold"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_what_others_write(home.parent, home.parent.stat())  # where the directory could be exchanged
    refuse_what_others_write(home, home.lstat())
    return home


def refuse_what_others_write(path: Path, found: os.stat_result, also: int = 0) -> None:
    """Refuse a place in which another user could put what this process would run or read; `also` are modes to refuse.

    Raises:
        OSError: it belongs to another user, is a link, or others may write to it (and replace what is in it).
    """
    others_write = found.st_mode & (stat.S_IWOTH | also) and not found.st_mode & stat.S_ISVTX
    if others_write or found.st_uid not in (os.geteuid(), 0) or stat.S_ISLNK(found.st_mode):
        raise OSError(f"{path}: other users can write there, so nothing is kept or used there")
