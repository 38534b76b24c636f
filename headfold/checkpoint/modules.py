"""modules.json: the steps of a sentence-transformers model and the directories that they lie in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.json_input import read_list, read_object

MODULES = "modules.json"


@dataclass(frozen=True, slots=True)
class Module:
    """One step: its kind, such as `Pooling`, and its directory; an empty one is the model's own."""

    kind: str
    directory: str


def read_modules(path: Path) -> list[Module]:
    """Return the steps of the sentence-transformers model in a directory.

    Raises:
        UserError: modules.json is no list of steps with a type and a path, or a path leads out of the directory.
    """
    file = path / MODULES
    listed = read_list(file)
    if not all(isinstance(step, dict) and {"type", "path"} <= step.keys() for step in listed):
        raise UserError(f"{file}: expected a list of modules, each with type and path; download or copy it again")
    for step in listed:
        if not isinstance(step["type"], str) or not _lies_inside(step["path"]):
            raise UserError(
                f"{file}: expected the name of a module and of a directory beside it, got {step['type']!r:.60} and {step['path']!r:.60}; "
                "correct the file"
            )
    return [Module(step["type"].rpartition(".")[2], step["path"]) for step in listed]


def read_pooling(file: Path) -> dict[str, Any]:
    """Return the config of a pooling; `pooling_mode`, where it has one, names one pooling or several.

    Raises:
        UserError: the file is no JSON object, or names no pooling by its name.
    """
    config = read_object(file)
    named = config.get("pooling_mode")
    several = isinstance(named, list) and all(isinstance(name, str) for name in named)
    if not (named is None or isinstance(named, str) or several):
        raise UserError(f"{file}: pooling_mode: expected the name of a pooling, got {named!r:.60}; correct the file")
    return config


def _lies_inside(path: object) -> bool:
    """Return whether a path stays below the directory, so that nothing outside the checkpoint is read."""
    return isinstance(path, str) and "\0" not in path and not Path(path).is_absolute() and ".." not in Path(path).parts
