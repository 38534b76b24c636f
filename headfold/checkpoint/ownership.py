"""One run at a time writes to an output place: a lock that ends with its process, and a record of who holds it."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.json_input import read_object
from .disk import disk_errors, is_temporary

_NAME = ".headfold-lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""What a file system without locks answers."""
_ATTEMPTS = 100
"""How often runs that end may take a lock away from under the one that begins here."""
_held: set[int] = set()
"""Descriptors of the locks of this process."""


def lock_beside(out: Path) -> Path:
    """Return the lock of an output that is renamed into its place; it lies beside it, so that no renaming moves it."""
    place = Path(os.path.abspath(out))
    return place.with_name(f".{place.name}{_NAME}")


def lock_inside(directory: Path) -> Path:
    """Return the lock of a directory that is filled where it is; the one above it may be closed to the user."""
    return Path(os.path.abspath(directory)) / _NAME


def has_contents(directory: Path) -> bool:
    """Return whether a directory has entries other than the lock and what a kill left of a file that was being written."""
    return directory.exists() and any(entry.name != _NAME and not is_temporary(entry) for entry in directory.iterdir())


def refuse_contents(directory: Path, force: bool) -> None:
    """Refuse to write beside files that the user did not give up, or where a directory is none.

    Raises:
        UserError: a file is there, or a directory with contents without `force`.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: expected a directory to write to or nothing, got a file; choose another")
    if has_contents(directory) and not force:
        raise UserError(
            f"{directory}: expected nothing there, got files; choose another or pass --force to replace them"
        )


class PlaceOwned(UserError):
    """Another run writes to the place."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An output place that this process owns until `release`, or until it ends."""

    lock: Path
    record: Mapping[str, Any]
    descriptor: int | None
    """The open file on which the lock lies; None where the file system has no locks."""

    def release(self) -> None:
        """Give the place up and remove the file; in a forked child, which inherits this object, do nothing."""
        if self.record["pid"] != os.getpid():
            return
        # Removed while it is locked: who has opened it by then finds after locking it that it lies there no more, and begins anew.
        if _read(self.lock) == self.record:
            self.lock.unlink(missing_ok=True)
        if self.descriptor is not None:
            _held.discard(self.descriptor)
            os.close(self.descriptor)


def claim(out: Path, lock: Path) -> Claim:
    """Make this process the owner of the output place `out`, by the file `lock`.

    Raises:
        PlaceOwned: another run owns it.
        UserError: the place cannot be written to.
    """
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            if (claimed := _try_claim(out, lock, record)) is not None:
                return claimed
    raise _refusal(out, {}, lock)


def _try_claim(out: Path, lock: Path, record: Mapping[str, Any]) -> Claim | None:
    """Return the claim; None if the last owner removed the file between its opening and its locking here."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        if not _is_locked(out, lock, descriptor):
            return _claim_without_lock(out, lock, {**record, "locked": False})
        if not _lies_at(lock, descriptor):
            return None
        _refuse_living(out, lock, locked=True)
        return _kept(Claim(lock, {**record, "locked": True}, descriptor))
    finally:
        if descriptor not in _held:
            os.close(descriptor)


def _is_locked(out: Path, lock: Path, descriptor: int) -> bool:
    """Lock the file and return True; False where the file system has no locks.

    Raises:
        UserError: another run has locked it.
    """
    try:
        # The lock of an open file, not of a process (lockf): it excludes other threads too, and reading the record does not drop it.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(out, _read(lock)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _kept(owned: Claim) -> Claim:
    assert owned.descriptor is not None
    try:
        os.ftruncate(owned.descriptor, 0)
        os.pwrite(owned.descriptor, json.dumps(owned.record).encode(), 0)
    except OSError:  # a full disk
        owned.lock.unlink(missing_ok=True)
        raise
    _close_in_children()
    _held.add(owned.descriptor)
    return owned


def _claim_without_lock(out: Path, lock: Path, record: Mapping[str, Any]) -> Claim:
    """Own the place by the record alone, on a network file system without locks.

    It holds as long as the process that it names is alive. A process of another host cannot be looked up from here, so its record
    holds until someone removes it. Reading and writing it is one step, made so by a file that only one process can create.
    """
    turn = lock.with_name(f"{lock.name}-turn")
    try:
        os.close(os.open(turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError as error:
        raise _refusal(out, {}, turn) from error
    try:
        _refuse_living(out, lock, locked=False)
        lock.write_text(json.dumps(record))
    finally:
        turn.unlink(missing_ok=True)
    return Claim(lock, record, None)


def _refuse_living(out: Path, lock: Path, *, locked: bool) -> None:
    """Refuse a place whose record names a process that may be alive; one that relied on a lock is not, where the lock was free."""
    record = _read(lock)
    if record and not (locked and record.get("locked", True)) and _may_be_alive(record):
        raise _refusal(out, record, lock)


def _refusal(out: Path, record: Mapping[str, Any], remove: Path | None = None) -> PlaceOwned:
    holder = f"process {record['pid']} on {record['host']} since {record['since']}" if record else "one that just began"
    advice = "" if remove is None else f"; if no such run exists any more, remove {remove}"
    return PlaceOwned(
        f"{out}: expected no other run that writes there, got {holder}; wait until it ends or choose another output place{advice}"
    )


def _may_be_alive(record: Mapping[str, Any]) -> bool:
    if record["host"] != socket.gethostname():
        return True
    if Path("/proc/self/stat").exists():
        return record["started"] is not None and _start_of(record["pid"]) == record["started"]
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _start_of(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks, which tells it from a later one of the same number; None if it is dead or
    the system does not say.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _read(lock: Path) -> dict[str, Any]:
    """Return who owns a place; nothing where the file does not say."""
    try:
        record = read_object(lock)
        whole = {"host", "started", "since"} <= record.keys() and isinstance(record.get("pid"), int)
        return record if whole else {}
    except (OSError, UserError):
        return {}


def _lies_at(lock: Path, descriptor: int) -> bool:
    """Return whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False


@cache
def _close_in_children() -> None:
    """Let forked children drop the locks, which would otherwise hold as long as a child that outlives its parent."""
    os.register_at_fork(after_in_child=_close_held)


def _close_held() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
