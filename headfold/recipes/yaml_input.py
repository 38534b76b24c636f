"""YAML from outside, parsed in one place: plain values by key, each with its line, bounded, and refused in one line otherwise."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import regular_file
from ..core.json_input import MAX_DIGITS

MAX_BYTES = 2**20
"""More than anyone writes by hand."""
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a YAML file and the line of its name, counted from 1.

    The value is a string, a number, a truth value, None, a list of such, or a mapping of names to entries.
    """

    value: Any
    line: int


def read_mapping(path: Path) -> dict[str, Entry]:
    """Return the mapping that a YAML file holds.

    Raises:
        UserError: no regular file, a longer one than `MAX_BYTES`, no YAML in UTF-8, or one with aliases, tags, keys that occur twice,
            or values that are neither plain nor lists or mappings of plain ones.
    """
    found = regular_file(path, "a recipe, a file of YAML").stat()
    if found.st_size > MAX_BYTES:
        raise UserError(f"{path}: expected at most {MAX_BYTES} bytes of YAML, got {found.st_size}; give a recipe")
    with path.open("rb") as file:
        return _mapping(file.read(MAX_BYTES), str(path))


def _mapping(text: bytes, where: str) -> dict[str, Entry]:
    import yaml

    loader: Any = None
    try:
        decoded = text.decode("utf-8-sig")
        for event in yaml.parse(decoded, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # a few lines of them can stand for more than memory holds
                raise UserError(
                    f"{where}:{_line(event)}: expected no aliases, got *{event.anchor}; write the value again"
                )
            if (tag := getattr(event, "tag", None)) is not None:
                raise UserError(f"{where}:{_line(event)}: expected no tags, got {tag!r:.60}; leave it out")
        loader = yaml.SafeLoader(decoded)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            got = "nothing" if root is None else f"a {root.id}"
            raise UserError(f"{where}: expected a mapping, such as model: my-model, got {got}; correct the recipe")
        found: dict[str, Entry] = _value(loader, root, where)
        return found
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f":{mark.line + 1}"
        said = " ".join(f"{error.problem or error.context}".split())
        raise UserError(f"{where}{line}: not valid YAML: {said}; correct the recipe") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        said = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not valid YAML: {said}; correct the recipe") from error
    finally:
        if loader is not None:
            loader.dispose()


def _value(loader: Any, node: Any, where: str) -> Any:
    """Return the value of a node, as an `Entry` holds it."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        entries: dict[str, Entry] = {}
        for key, value in node.value:
            name = _plain(loader, key, where)
            if not isinstance(name, str):
                raise UserError(f"{where}:{_line(key)}: expected a name before the colon, got {name!r:.60}; quote it")
            if name in entries:
                raise UserError(f"{where}:{_line(key)}: {name}: it stands twice in one mapping; leave one out")
            entries[name] = Entry(_value(loader, value, where), _line(key))
        return entries
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, where) for item in node.value]
    return _plain(loader, node, where)


def _plain(loader: Any, node: Any, where: str) -> Any:
    """Return the value of a scalar."""
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where}:{_line(node)}: expected a plain value, got a {node.id}; write it on one line")
    value = loader.construct_object(node)
    if not isinstance(value, _PLAIN) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{where}:{_line(node)}: expected text or a number, got {node.value!r:.60}; quote it")
    if isinstance(value, int) and value >= 10**MAX_DIGITS:
        raise UserError(f"{where}:{_line(node)}: expected a number of at most {MAX_DIGITS} digits, got a longer one")
    if isinstance(value, str) and not value.isprintable():
        raise UserError(f"{where}:{_line(node)}: expected printable text on one line, got {value!r:.60}; correct it")
    return value


def _line(node: Any) -> int:
    line: int = node.start_mark.line + 1
    return line
