"""The files of a frontier: a plan per point, frontier.json and frontier.png, in a directory that is marked while it is filled."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.staging import write_json
from ..core.errors import UserError
from ..core.json_input import read_object
from ..core.plan import Plan
from ..core.records import record
from ..parallel import is_main
from ..reports.plot import plot_frontier
from .frontier import Point
from .sensitivity_file import Sensitivities, read_sensitivities

_UNFINISHED = ".headfold-unfinished"
"""Lies in the directory until all is written, and lists the plans that may be there: the same command may be run again."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What frontier.json says, as `headfold frontier` returned it."""

    points: list[Point]
    rank_correlation: float | None
    site_rank_correlation: float | None


def read_front(directory: Path) -> tuple[list[Point], float | None, float | None, Sensitivities]:
    """Return the points of a finished frontier, its two rank correlations, and the sensitivities that were measured there.

    Raises:
        UserError: a file there is not of this version.
    """
    file, advice = directory / "frontier.json", "name a folder that this version of headfold frontier wrote"
    found = record(_Facts, read_object(file, advice), str(file), advice)
    if any(point.kv_bytes_per_token < 1 for point in found.points):
        raise UserError(f"{file}: expected points of positive bytes, got others; {advice}")
    measured = read_sensitivities(directory / "sensitivity.json", {})
    return found.points, found.rank_correlation, found.site_rank_correlation, measured


def is_unfinished(directory: Path) -> bool:
    """Return whether an earlier run was killed while it filled the directory."""
    return (directory / _UNFINISHED).is_file()


@contextmanager
def unfinished(directory: Path) -> Iterator[None]:
    """Mark the directory until it is whole; a request that is refused before anything is written leaves no mark."""
    mark, before = directory / _UNFINISHED, set(directory.iterdir())
    if is_main() and mark not in before:
        write_json(mark, {"points": []})
    try:
        yield
    except UserError:
        if is_main() and set(directory.iterdir()) == before | {mark} and mark not in before:
            mark.unlink()
        raise
    if is_main():
        mark.unlink()


def write_points(
    directory: Path, facts: Mapping[str, Any], points: Sequence[Point], plans: Mapping[str, Plan], title: str
) -> None:
    """Write a plan per point, frontier.json with `facts`, and frontier.png."""
    # Of an earlier frontier, which --force gave up, or of one that was killed.
    for left in _plans_of(directory / "frontier.json") + _plans_of(directory / _UNFINISHED):
        (directory / left).unlink(missing_ok=True)
    write_json(directory / _UNFINISHED, facts)
    for point in points:
        write_json(directory / point.plan, plans[point.plan].to_json())
    write_json(directory / "frontier.json", facts)
    plot_frontier(directory / "frontier.png", points, title=title)


def _plans_of(earlier: Path) -> list[str]:
    """Return the file names of the plans that an earlier frontier.json lists; everything else there is the user's."""
    try:
        names = [str(point["plan"]) for point in read_object(earlier)["points"]]
    except (OSError, UserError, KeyError, TypeError):
        return []
    return [name for name in names if re.fullmatch(r"plan-\d+[a-z0-9-]*\.json", name)]
