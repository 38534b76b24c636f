"""Options as verbs take them, and the output of their results."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from ..core.errors import UserError
from ..parallel import is_main


def names(text: str | None) -> tuple[str, ...] | None:
    """Split a list such as `a,b`; None for None."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def counts(option: str, text: str) -> tuple[int, ...]:
    """Split a list of counts such as `1,8,32`.

    Raises:
        UserError: the text is not a list of counts.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{option}: expected counts such as 8 or 1,8,32, got {text}")
    return tuple(map(int, words))


def given(**options: Any) -> dict[str, Any]:
    """Return the options that the user wrote; all others keep the defaults of the verbs."""
    return {name: value for name, value in options.items() if value is not None}


def renamed(old: str, new: str, old_value: Any, new_value: Any) -> Any:
    """Return the value of an option that has a former name, and say so where that was used.

    Raises:
        UserError: both were given.
    """
    if old_value is None:
        return new_value
    if new_value is not None:
        raise UserError(f"{old} and {new}: expected one of them, as {old} is the former name of {new}")
    if is_main():
        print(f"headfold: {old} is now called {new}; the old name goes with the next release", file=sys.stderr)
    return old_value


def answered(facts: Any, as_json: bool) -> bool:
    """Print the machine-readable form if it was asked for, and return whether nothing is left to print; workers never print."""
    if as_json and is_main():
        print(json.dumps(_finite(facts), default=str))
    return as_json or not is_main()


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
