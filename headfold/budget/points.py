"""The files of a frontier: a plan per point, frontier.json and frontier.png, in a directory that is marked while it is filled."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.staging import write_json
from ..core.errors import UserError
from ..core.json_input import read_object
from ..core.plan import Plan
from ..parallel import is_main
from ..reports.plot import plot_frontier
from .frontier import Point

_UNFINISHED = ".headfold-unfinished"
"""Lies in the directory until all is written, and lists the plans that may be there: the same command may be run again."""


def is_unfinished(directory: Path) -> bool:
    """Return whether an earlier run was killed while it filled the directory."""
    return (directory / _UNFINISHED).is_file()


@contextmanager
def unfinished(directory: Path) -> Iterator[None]:
    """Mark the directory while it is filled; a request that is refused before anything is written leaves no mark."""
    mark, before = directory / _UNFINISHED, set(directory.iterdir())
    if is_main() and mark not in before:
        write_json(mark, {"points": []})
    try:
        yield
    except UserError:
        if is_main() and set(directory.iterdir()) == before | {mark} and mark not in before:
            mark.unlink()
        raise


def write_points(
    directory: Path, facts: Mapping[str, Any], points: Sequence[Point], plans: Mapping[str, Plan], title: str
) -> None:
    """Write a plan per point, frontier.json with `facts`, and frontier.png; the directory is finished then."""
    # Of an earlier frontier, which --force gave up, or of one that was killed.
    for left in _plans_of(directory / "frontier.json") + _plans_of(directory / _UNFINISHED):
        (directory / left).unlink(missing_ok=True)
    write_json(directory / _UNFINISHED, facts)
    for point in points:
        write_json(directory / point.plan, plans[point.plan].to_json())
    write_json(directory / "frontier.json", facts)
    plot_frontier(directory / "frontier.png", points, title=title)
    (directory / _UNFINISHED).unlink()


def _plans_of(earlier: Path) -> list[str]:
    """Return the file names of the plans that an earlier frontier.json lists; everything else there is the user's."""
    try:
        names = [str(point["plan"]) for point in read_object(earlier)["points"]]
    except (OSError, UserError, KeyError, TypeError):
        return []
    return [name for name in names if re.fullmatch(r"plan-\d+[a-z0-9-]*\.json", name)]
