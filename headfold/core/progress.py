"""How long jobs say where they are."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), in the units of the stage: tokens, items, sites or bytes."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
    del stage, done, total


def silent(line: str) -> None:
    """Say nothing."""
    del line


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Return a function that adds to the units done in a stage and reports the sum; reports the start itself."""
    done = 0
    progress(stage, 0, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return advance
