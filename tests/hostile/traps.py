"""Numbered file-system events of a command: what it opens for writing, writes, renames and removes in a folder, each an event.

A trap acts at the n-th of them, before it or after it. Writes of compiled libraries pass unseen; kills by time meet those.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Act = Callable[[str], None]
"""What a trap does; it is told the name of the event."""

_BY_PATH = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "chmod", "truncate")
_BY_DESCRIPTOR = ("fsync", "ftruncate", "pwrite", "write", "writev", "sendfile", "copy_file_range", "posix_fallocate")
_GROWS = {
    "open",
    "mkdir",
    "link",
    "symlink",
    "pwrite",
    "write",
    "writev",
    "sendfile",
    "copy_file_range",
    "fsync",
    "posix_fallocate",
}
"""Events that fail on a full disk."""


class Events:
    """Counts the events in a folder and acts at some of them."""

    def __init__(self, folder: Path, act: Act) -> None:
        self._folder, self._act = str(folder.resolve()), act

    def watch(self) -> None:
        """Replace the functions of this process; it is a child that ends with its command."""
        for name in _BY_PATH:
            setattr(os, name, self._around(name, getattr(os, name), lambda arguments: self._inside(arguments[0])))
        for name in _BY_DESCRIPTOR:
            setattr(os, name, self._around(name, getattr(os, name), lambda arguments: arguments[0] > 2))
        os.open = self._around("open", os.open, self._opens_to_write)
        opened = self._around("open", io.open, self._is_written)
        builtins.open = io.open = opened  # type: ignore[assignment]

    def _around(
        self, name: str, function: Callable[..., Any], counts: Callable[[tuple[Any, ...]], bool]
    ) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if not counts(arguments):
                return function(*arguments, **options)
            self._act(name)
            result = function(*arguments, **options)
            self._act(f"after {name}")
            return result

        return called

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return path > 2
        return os.path.abspath(os.fsdecode(path)).startswith(f"{self._folder}/")

    def _opens_to_write(self, arguments: tuple[Any, ...]) -> bool:
        return bool(arguments[1] & (os.O_WRONLY | os.O_RDWR)) and self._inside(arguments[0])

    def _is_written(self, arguments: tuple[Any, ...]) -> bool:
        mode = arguments[1] if len(arguments) > 1 else "r"
        return isinstance(mode, str) and bool(set(mode) & set("wax+")) and self._inside(arguments[0])


def counting(folder: Path, report: Path) -> Callable[[], None]:
    """Return a trap that counts all events and writes their number to a file outside the folder."""

    def set_trap() -> None:
        count = 0
        write = Path.write_text

        def act(name: str) -> None:
            nonlocal count
            count += 1
            write(report, str(count))

        Events(folder, act).watch()

    return set_trap


def at(folder: Path, number: int, act: Act) -> Callable[[], None]:
    """Return a trap that acts at one event."""

    def set_trap() -> None:
        count = 0

        def counted(name: str) -> None:
            nonlocal count
            count += 1
            if count == number:
                act(name)

        Events(folder, counted).watch()

    return set_trap


def killed(name: str) -> None:
    """End this process as a lost machine would."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted(name: str) -> None:
    """Press Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def listening(trap: Callable[[], None]) -> Callable[[], None]:
    """Return a trap with Python's own handler of Ctrl-C, which processes in the background have not."""

    def set_trap() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trap()

    return set_trap


def full_from(folder: Path, number: int) -> Callable[[], None]:
    """Return a trap of a disk that is full from an event on."""

    def set_trap() -> None:
        count = 0

        def act(name: str) -> None:
            nonlocal count
            count += 1
            if count >= number and name in _GROWS:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        Events(folder, act).watch()

    return set_trap
