"""Progress of a job on stderr: bars on a terminal, elsewhere a line at least every 30 seconds and one at the end of each stage."""

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from ..parallel import is_main
from .tables import duration, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

INTERVAL = 30.0
"""Seconds between two lines of a running stage where stderr is not a terminal."""
UNITS = {
    "plan": "sites", "fit": "sites", "inspect": "sites", "laws": "laws", "verify": "models", "check": "runs", "uptrain": "tokens or items",
    "calibrate": "tokens or items", "refit": "tokens or items", "heal": "tokens or items", "export": "bytes",
    "losses": "items", "divergences": "items", "generate": "items", "classify": "items", "embed": "items",
    "write": "bytes", "decode": "bytes", "sensitivity": "folds", "frontier": "points", "compare": "folds", "bench": "rounds",
    "requests": "requests", "read": "paths", "samples": "texts",
}  # fmt: skip
"""Stage → what it counts; stages that are not listed count tokens."""


class ProgressReport:
    """Shows progress when it is called with (stage, done, total); use it as a context manager, which ends the last stage.

    Where `to` is no terminal, a thread prints the state of the running stage every `interval` seconds, so that a stage that does not
    advance is not silent either, nor the time before the first stage. When `brief`, as where stdout is JSON for another program, these
    lines are all there is, on a terminal too. Ranks other than 0 print nothing.
    """

    def __init__(self, to: TextIO | None = None, *, brief: bool = False, interval: float = INTERVAL) -> None:
        self._to, self._brief, self._interval = to or sys.stderr, brief, interval
        self._stage, self._start, self._done, self._total = "", time.monotonic(), 0, 0
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> "ProgressReport":
        if (self._brief or not self._to.isatty()) and is_main():
            threading.Thread(target=self._print_regularly, name="headfold-progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with self._lock:
            self._finish(complete=error is None)
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not is_main():
            return
        with self._lock:
            if stage != self._stage:
                self._finish()
                self._begin(stage, total)
            self._done, self._total = done, total
            if self._bars is not None and self._task is not None:
                rate = self._rate() if total > 1 else ""
                self._bars.update(self._task, completed=done, total=total or None, rate=rate)

    def say(self, line: str) -> None:
        """Print a line beside the bars."""
        if self._brief or not is_main():
            return
        if self._bars is not None:
            self._bars.console.print(line, highlight=False)
        else:
            print(line, file=self._to, flush=True)

    def _begin(self, stage: str, total: int) -> None:
        self._stage, self._start, self._done = stage, time.monotonic(), 0
        if self._to.isatty() and not self._brief:
            self._bars = self._bars or _bars(self._to)
            self._task = self._bars.add_task(stage, total=total or None, rate="")

    def _finish(self, *, complete: bool = True) -> None:
        """End the running stage. A stage that another one follows is complete, whatever count was last reported."""
        if self._stage and complete:
            self._done = self._total or self._done
            if self._bars is not None and self._task is not None:
                self._bars.update(self._task, completed=self._done, rate=self._rate())
            elif not self._brief:
                self._print_end()
        self._stage, self._start = "", time.monotonic()

    def _print_regularly(self) -> None:
        while not self._ended.wait(self._interval):
            with self._lock:
                print(self._state(), file=self._to, flush=True)

    def _state(self) -> str:
        """Return a line on the running stage: `calibrate: 42 %, 1,240 tokens/s, 0:35 left`."""
        passed = time.monotonic() - self._start
        if not self._stage:
            return f"starting, running for {clock(passed)}"
        if self._total <= 1:
            counted = f"{amount(self._stage, self._done)}, " if self._done > 1 else ""
            return f"{self._stage}: {counted}running for {clock(passed)}"
        if self._done >= self._total:
            return f"{self._stage}: 100 %, finishing, running for {clock(passed)}"
        percent = f"{self._stage}: {100 * self._done / self._total:.0f} %"
        if not self._done:
            return f"{percent}, running for {clock(passed)}"
        return f"{percent}, {self._rate()}, {clock(passed / self._done * (self._total - self._done))} left"

    def _print_end(self) -> None:
        passed = duration(time.monotonic() - self._start)
        counted = f"{amount(self._stage, self._done)} in " if max(self._total, self._done) > 1 else ""
        rate = f", {self._rate()}" if counted else ""
        print(f"{self._stage}: {counted}{passed}{rate}", file=self._to, flush=True)

    def _rate(self) -> str:
        passed = max(time.monotonic() - self._start, 1e-3)
        return f"{amount(self._stage, self._done / passed)}/s"


def amount(stage: str, number: float) -> str:
    """Return a count with the unit of its stage: `12,300 tokens`, `5 sites`, `1.2 GiB`."""
    unit = UNITS.get(stage.split()[0], "tokens")
    if unit == "bytes":
        return size(number)
    return f"{number:,.0f} {unit}" if number >= 10 or number == int(number) else f"{number:.1f} {unit}"


def clock(seconds: float) -> str:
    """Return a time as `0:35`, `12:07` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bars(to: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]:>18}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bars = Progress(*columns, console=Console(file=to))
    bars.start()
    return bars
