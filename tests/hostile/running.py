"""Run the command line in a forked child with limits of time and memory: everything is imported once, a case costs its own work."""

import atexit
import faulthandler
import importlib
import io
import os
import pkgutil
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

LIMIT_SECONDS = 60.0
"""A case takes one or two seconds alone; this leaves room for a busy machine."""
LIMIT_BYTES = 6 * 2**30
"""Address space that a case may add to what the imports take."""

_LATE = (
    "datasets", "pandas", "PIL.Image", "pyarrow.parquet", "scipy.linalg", "scipy.optimize", "transformers.modeling_utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "t5", "vit")),
)  # fmt: skip
"""What the verbs import where they need it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended: its exit code, or minus the signal that ended it, and what it printed."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False


def prepare() -> None:
    """Import what the verbs import, so that children need not; nothing is computed, as torch's threads would not survive a fork."""
    import headfold

    for module in pkgutil.walk_packages(headfold.__path__, "headfold."):
        if not re.search(r"__main__|\.drivers|\.builders|\.bundled|modeling_", module.name):
            importlib.import_module(module.name)
    for name in _LATE:
        importlib.import_module(name)
    torch.set_num_threads(1)


def run(
    words: Sequence[object],
    folder: Path,
    *,
    before: Callable[[], None] | None = None,
    limit: float = LIMIT_SECONDS,
    kill_after: float | None = None,
) -> Outcome:
    """Run `headfold WORDS` in `folder`.

    `before` is called in the child ahead of the command, to set traps. With `kill_after`, SIGKILL arrives after so many seconds.
    """
    return start(words, folder, before=before).wait(limit, kill_after)


@dataclass(frozen=True, slots=True)
class Running:
    """A command that runs; what it prints lies in two files."""

    pid: int
    printed: tuple[Path, Path]
    started: float

    def wait(self, limit: float = LIMIT_SECONDS, kill_after: float | None = None) -> Outcome:
        """Wait for the end; kill the command and its children after `limit` or `kill_after` seconds."""
        descriptor = os.pidfd_open(self.pid)
        patience = limit if kill_after is None else min(limit, kill_after)
        ready, _, _ = select.select([descriptor], [], [], max(0.0, self.started + patience - time.monotonic()))
        os.close(descriptor)
        if not ready:
            if kill_after is None:  # says where it hangs
                os.kill(self.pid, signal.SIGABRT)
                time.sleep(1)
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        # A kill may come before there are files.
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self.printed)
        for file in self.printed:
            file.unlink(missing_ok=True)
        return Outcome(code, out, err, time.monotonic() - self.started, hung=not ready and kill_after is None)


def start(
    words: Sequence[object], folder: Path, *, before: Callable[[], None] | None = None, name: str = "0"
) -> Running:
    """Start `headfold WORDS` in `folder`; `name` tells apart the printed files of several that run at once."""
    printed = folder.parent / f"{folder.name}.{name}.out", folder.parent / f"{folder.name}.{name}.err"
    started = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child([str(word) for word in words], folder, printed, before)
    # Both set it, so that it is set whoever comes first.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    return Running(pid, printed, started)


def _child(words: list[str], folder: Path, printed: tuple[Path, Path], before: Callable[[], None] | None) -> None:
    code = 70  # an error of the harness itself
    try:
        os.setpgid(0, 0)
        atexit._clear()  # what the parent has to remove at its end is not the child's
        for file, descriptor in zip(printed, (1, 2), strict=True):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
            os.close(opened)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it lives as long as the child
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "wb", closefd=False), write_through=True) for number in (1, 2)
        )
        faulthandler.enable(2)
        os.chdir(folder)
        _limit_memory()
        sys.argv = ["headfold", *words]
        if before is not None:
            before()
        code = _main()
    except BaseException:  # noqa: BLE001 - what the command line lets through is what the judge looks for
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        os._exit(code)


def _main() -> int:
    from headfold.__main__ import main

    try:
        main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
