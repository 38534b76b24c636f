"""Tell what a user named: a fold, a folder of compare or of frontier, or a file with a result."""

import math
from pathlib import Path

from ..comparison import method_rows
from ..core.errors import UserError
from ..core.json_input import read_object
from .contents import MethodTable

COMPARE, FRONTIER = "compare.json", "frontier.json"
KINDS = {COMPARE: "comparison", FRONTIER: "frontier", "plan.json": "fold"}
"""File that a directory has → what the directory is."""


def kind_of_path(path: Path) -> str:
    """Return what a path leads to: `fold`, `comparison`, `frontier` or `result`, a file of JSON.

    Raises:
        UserError: it is none of these, or there is nothing.
    """
    if path.is_dir():
        for file, kind in KINDS.items():
            if (path / file).exists() and (kind != "fold" or (path / "config.json").exists()):
                return kind
        raise UserError(
            f"{path}: expected a fold (plan.json and config.json), or the folder of headfold compare (compare.json) or frontier "
            "(frontier.json), found none of these files there; check the path"
        )
    if not path.exists():
        raise UserError(f"{path}: expected a directory or a file with JSON, found nothing there; check the path")
    return "result"


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
