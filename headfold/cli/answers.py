"""What verbs do with their options and with their result."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..core.errors import UserError
from ..parallel import leads


def names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def given(**options: Any) -> dict[str, Any]:
    """The options that the user wrote; the others keep the defaults of the functions."""
    return {name: value for name, value in options.items() if value is not None}


def answer(facts: Mapping[str, Any], as_json: bool) -> bool:
    """Print the machines' form if it was asked for, and say whether nothing is left to print; followers of a job never print."""
    if as_json and leads():
        print(json.dumps(_finite(facts), default=str))
    return as_json or not leads()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counts(option: str, text: str) -> tuple[int, ...]:
    """Counts in a list such as 1,8,32."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{option}: expected counts such as 8 or 1,8,32, got {text}")
    return tuple(map(int, words))
