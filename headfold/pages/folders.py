"""Tell what a user named: a fold, a folder of run, of compare or of frontier, or a file with a result."""

import math
from collections.abc import Iterable
from pathlib import Path

from ..comparison import method_rows
from ..core.errors import UserError
from ..core.json_input import read_object
from ..recipes.steps import FILE as RUN
from ..recipes.steps import finished_folds
from .contents import MethodTable

COMPARE, FRONTIER, EVALUATION = "compare.json", "frontier.json", ".eval.json"
KINDS = {COMPARE: "comparison", FRONTIER: "frontier", RUN: "run", "plan.json": "fold"}
"""File that a directory has → what the directory is."""


def kind_of_path(path: Path) -> str:
    """Return what a path leads to: `fold`, `run`, `comparison`, `frontier` or `result`, a file of JSON.

    Raises:
        UserError: it is none of these, or there is nothing.
    """
    if path.is_dir():
        for file, kind in KINDS.items():
            if (path / file).exists() and (kind != "fold" or (path / "config.json").exists()):
                return kind
        raise UserError(
            f"{path}: expected a fold (plan.json and config.json), or the folder of headfold run (run.json), compare (compare.json) or "
            "frontier (frontier.json), found none of these files there; check the path"
        )
    if not path.exists():
        raise UserError(f"{path}: expected a directory or a file with JSON, found nothing there; check the path")
    return "result"


def with_kinds(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Return paths and their kinds, with the folds of a run and their evaluations in the place of its folder.

    Raises:
        UserError: as `kind_of_path`, or a run has not finished a fold.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        kind = kind_of_path(path)
        if kind != "run":
            found.append((path, kind))
            continue
        folds = finished_folds(path)
        if not folds:
            raise UserError(
                f"{path}: expected a folder with finished folds, found none; run the same headfold run again"
            )
        measured = [file for fold in folds if (file := path / f"{fold.name}{EVALUATION}").is_file()]
        found += [*((fold, "fold") for fold in folds), *((file, "result") for file in measured)]
    return found


def name_of(path: Path) -> str:
    """Return the name of a directory on the page."""
    return path.resolve().name


def refuse_same_names(directories: list[Path]) -> None:
    """Refuse directories that the page could not tell apart.

    Raises:
        UserError: two have one name.
    """
    named: dict[str, Path] = {}
    for path in directories:
        earlier = named.setdefault(name_of(path), path)
        if earlier is not path:
            raise UserError(f"report: expected directories of different names, got {earlier} and {path}; rename one")


def read_methods(directory: Path) -> MethodTable:
    """Return the rows that `headfold compare` left in a folder.

    Raises:
        UserError: they are not rows of this version.
    """
    file = directory / COMPARE
    rows = method_rows(read_object(file), file)
    if any(min(row.kv_bytes_per_token, row.num_kv_heads) < 1 for row in rows):
        raise UserError(f"{file}: expected rows of positive counts, got others; compare again")
    whole = [
        row for row in rows if all(map(_is_finite, (row.value, row.loss_increase, row.kl, row.original, row.seconds)))
    ]
    return MethodTable(name_of(directory), whole, sorted({row.method for row in rows} - {row.method for row in whole}))


def _is_finite(value: float | None) -> bool:
    return value is None or abs(value) < math.inf
