"""Records from JSON: a dataclass built of an object that was read from outside, with every field of the type that it declares."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import UserError

Record = TypeVar("Record")
MOST_ITEMS = 100_000
"""Of a list or an object: more than any result has."""
MOST_CHARACTERS = 100_000
"""Of a text."""


def record(kind: type[Record], value: Any, where: str, advice: str, *, finite: bool = True) -> Record:
    """Return the dataclass `kind` built of a JSON object; fields that it does not declare are left out.

    A null in a list of numbers is NaN, as --json prints NaN as null. Other numbers are finite, unless `finite` says otherwise.

    Raises:
        UserError: it is no object, a field without a default is missing, or a field has another type; `where` names the value, `advice`
            says what to do.
    """
    try:
        return _record(kind, value, "", finite)
    except _Unexpected as error:
        raise UserError(f"{where}: {error}; {advice}") from error


class _Unexpected(Exception):
    """A value that is not as the record declares it."""


def _record(kind: type[Record], value: Any, at: str, finite: bool) -> Record:
    assert is_dataclass(kind)
    if not isinstance(value, dict):
        raise _Unexpected(f"{at}expected an object, got {type(value).__name__}")
    hints, made = get_type_hints(kind), {}
    for field in fields(kind):
        if not field.init:
            continue
        if field.name in value:
            made[field.name] = _value(hints[field.name], value[field.name], f"{at}{field.name}: ", finite)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise _Unexpected(f"{at}expected a field {field.name}, found none")
    return kind(**made)


def _value(kind: Any, value: Any, at: str, finite: bool) -> Any:
    """Return a value as a field of this type holds it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        if type(None) in args and (value is None or value != value):  # a statistic that is not defined
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, at, finite)
    if origin in (list, tuple):
        return origin(_items(origin, args, value, at, finite))
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, dict) or len(value) > MOST_ITEMS:
            raise _Unexpected(f"{at}expected an object, got {_short(value)}")
        return {_text(name, at): _value(args[1], item, f"{at}{name:.60}: ", finite) for name, item in value.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        return _record(kind, value, at, finite)
    if kind is str:
        return _text(value, at)
    if kind is float:
        if type(value) not in (int, float) or (finite and not abs(value) <= 1e300):
            raise _Unexpected(f"{at}expected a finite number, got {_short(value)}")
        return float(value)
    assert kind in (int, bool), kind
    if type(value) is not kind or abs(value) > 2**63:
        expected = "a whole number" if kind is int else "true or false"
        raise _Unexpected(f"{at}expected {expected}, got {_short(value)}")
    return value


def _items(origin: type, args: tuple[Any, ...], value: Any, at: str, finite: bool) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST_ITEMS:
        raise _Unexpected(f"{at}expected a list, got {_short(value)}")
    if origin is tuple and Ellipsis not in args and len(value) != len(args):
        raise _Unexpected(f"{at}expected {len(args)} items, got {len(value)}")
    if args[0] is float:
        value = [math.nan if item is None else item for item in value]
        return [item if item != item else _value(float, item, at, finite) for item in value]
    return [_value(args[0], item, f"{at}{number}: ", finite) for number, item in enumerate(value)]


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        raise _Unexpected(f"{at}expected a text of at most {MOST_CHARACTERS} characters, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    return f"{value!r:.60}"
