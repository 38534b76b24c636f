"""Sizes in bytes as people write them."""

import math
import re

from .errors import UserError

_SIZE = re.compile(r"\s*([0-9.]+)\s*(|k|M|G|T)(i?)B?\s*", re.IGNORECASE)


def parse_size(option: str, text: str, expected: str, *, with_unit: bool = False) -> float:
    """Return the bytes that `40KiB`, `24GB` or `65536` means; `expected` says in an error what the option takes.

    Raises:
        UserError: it is no positive size, or has no unit where it must have one.
    """
    found = _SIZE.fullmatch(text)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if not found or not 0 < number < math.inf or (with_unit and not found[2]):
        raise UserError(f"{option} {text}: expected {expected}")
    return number * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
