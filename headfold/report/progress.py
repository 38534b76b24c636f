"""How far a job is: bars with rate and time left on a terminal, one line per finished stage elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from .tables import duration, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

UNITS = {
    "plan": "sites", "uptrain": "tokens or items",
    "write": "bytes", "sensitivity": "folds", "frontier": "points", "compare": "folds", "bench": "rounds",
    "models": "models", "requests": "requests",
}  # fmt: skip
"""What a stage counts; tokens where it is not listed."""


class ProgressReport:
    """Call it with (stage, done, total). A context manager: leaving it ends the last stage."""

    def __init__(self, to: TextIO | None = None, *, silent: bool = False) -> None:
        self._to, self._silent = to or sys.stderr, silent
        self._stage, self._start, self._done, self._total = "", 0.0, 0, 0
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(complete=error is None)
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._silent:
            return
        if stage != self._stage:
            self._finish()
            self._begin(stage, total)
        self._done, self._total = done, total
        if self._bars is not None and self._task is not None:
            rate = self._rate() if total > 1 else ""
            self._bars.update(self._task, completed=done, total=total or None, rate=rate)

    def say(self, line: str) -> None:
        """A line beside the bars."""
        if self._silent:
            return
        if self._bars is not None:
            self._bars.console.print(line, highlight=False)
        else:
            print(line, file=self._to, flush=True)

    def _begin(self, stage: str, total: int) -> None:
        self._stage, self._start, self._done = stage, time.monotonic(), 0
        if self._to.isatty():
            self._bars = self._bars or _bars(self._to)
            self._task = self._bars.add_task(stage, total=total or None, rate="")

    def _finish(self, *, complete: bool = True) -> None:
        """End the running stage: a stage that another one follows is complete, whatever was last said of it."""
        if self._stage and complete:
            self._done = self._total or self._done
            if self._bars is not None and self._task is not None:
                self._bars.update(self._task, completed=self._done, rate=self._rate())
            else:
                self._print_line()
        self._stage = ""

    def _print_line(self) -> None:
        passed = duration(time.monotonic() - self._start)
        counted = f"{amount(self._stage, self._done)} in " if self._total > 1 else ""
        rate = f", {self._rate()}" if self._total > 1 else ""
        print(f"{self._stage}: {counted}{passed}{rate}", file=self._to, flush=True)

    def _rate(self) -> str:
        passed = max(time.monotonic() - self._start, 1e-3)
        return f"{amount(self._stage, self._done / passed)}/s"


def amount(stage: str, number: float) -> str:
    """`12,300 tokens`, `5 sites`, `1.2 GiB`."""
    unit = UNITS.get(stage.split()[0], "tokens")
    if unit == "bytes":
        return size(number)
    return f"{number:,.0f} {unit}" if number >= 10 or number == int(number) else f"{number:.1f} {unit}"


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
