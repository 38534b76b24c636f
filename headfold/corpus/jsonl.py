"""JSON lines: one object per line; its field `text` (or another, `file.jsonl:column`) is a document."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import regular_file
from ..core.json_input import parse_object
from .bounds import BoundedLines


def line_starts(path: Path) -> list[int]:
    """Return the byte offset of every line that is not blank.

    Raises:
        UserError: not a regular file, or a line that is too long.
    """
    starts, at = [], 0
    with regular_file(path, "JSON lines").open("rb") as file:
        for line in io.BufferedReader(BoundedLines(file, path)):
            if line.strip():
                starts.append(at)
            at += len(line)
    return starts


def documents(path: Path, column: str = "text", seed: int | None = None) -> Iterator[str]:
    """Yield the documents in file order, or in an order drawn from `seed`; only the requested lines are parsed.

    Raises:
        UserError: a line that is not a JSON object, or has no text under `column`.
    """
    starts = line_starts(path)
    if seed is not None:
        random.Random(seed).shuffle(starts)
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            yield _text(file.readline(), column, f"{path}: line at byte {start}")


def _text(line: bytes, column: str, where: str) -> str:
    found = record(line, where)
    if not isinstance(found.get(column), str):
        names = ", ".join(found)
        raise UserError(
            f"{where}: expected text under {column!r}, got {names:.200}; name the column as FILE.jsonl:COLUMN"
        )
    return found[column]


def record(line: bytes, where: str) -> dict[str, Any]:
    """Return the object in a line; `where` names it in messages.

    Raises:
        UserError: it is no JSON object.
    """
    return parse_object(line, where, "write one JSON object per line", is_data=True)
