"""JSON from outside, parsed in one place: bounded in size, depth and numbers, and refused in one line where it is something else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import regular_file

MAX_BYTES = 100_000_000
"""More than any index of a checkpoint takes; safetensors reads no longer header."""
MAX_DEPTH = 64
MAX_DIGITS = 40
"""More than `model_max_length` has in published tokenizers; such an integer can still become a float."""
AGAIN = "download or copy it again"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """Return the JSON object that a file holds. `advice` ends each message: what to do about it.

    Raises:
        UserError: no regular file, a longer one than `MAX_BYTES`, or no JSON object within the bounds of `parse`.
    """
    return _of_type(read_value(path, advice), dict, "object", str(path), advice)


def read_list(path: Path, advice: str = AGAIN) -> list[Any]:
    """Return the JSON array that a file holds.

    Raises:
        UserError: as `read_object`.
    """
    return _of_type(read_value(path, advice), list, "array", str(path), advice)


def read_value(path: Path, advice: str = AGAIN) -> Any:
    """Return the JSON value, of any type, that a file holds.

    Raises:
        UserError: as `read_object`.
    """
    found = regular_file(path, "a file with JSON").stat()
    if found.st_size > MAX_BYTES:
        raise UserError(f"{path}: expected at most {MAX_BYTES} bytes of JSON, got {found.st_size}; {advice}")
    with path.open("rb") as file:
        return parse(file.read(MAX_BYTES), str(path), advice)


def parse_object(text: bytes, where: str, advice: str = AGAIN, *, is_data: bool = False) -> dict[str, Any]:
    """Return the JSON object that a text holds; `where` names it in messages.

    Raises:
        UserError: it is no JSON object, or beyond the bounds of `parse`.
    """
    return _of_type(parse(text, where, advice, is_data=is_data), dict, "object", where, advice)


def parse(text: bytes, where: str, advice: str = AGAIN, *, is_data: bool = False) -> Any:
    """Return the JSON value that a text holds; in data, which is not written again, half a surrogate pair becomes `?`.

    Raises:
        UserError: it is not JSON in UTF-8; it is nested more than `MAX_DEPTH` deep; an integer has more than `MAX_DIGITS` digits;
            a string has half a surrogate pair, which can be neither printed nor written.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_int=_integer)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: not valid JSON: {reason}; {advice}") from error
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise UserError(f"{where}: not valid JSON: nested more than {MAX_DEPTH} deep; {advice}")
    if _SURROGATE.search(text):
        if is_data:
            return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: not valid JSON: a string has half a surrogate pair; {advice}") from error
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _is_deep(value: Any) -> bool:
    """Return whether a value is nested more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for container in level for item in _items(container)]
    return any(isinstance(item, dict | list) for item in level)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _of_type(value: Any, expected: type, name: str, where: str, advice: str) -> Any:
    if not isinstance(value, expected):
        raise UserError(f"{where}: expected a JSON {name}, got {type(value).__name__}; {advice}")
    return value
