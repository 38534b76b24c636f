"""The record that each serving engine declares, and the discovery of engines.

An engine is one file in `headfold/serving/engines` with one `ENGINE` record, and a driver of the same name in `headfold/serving/drivers`: a
script that runs in the engine's own environment and imports nothing of headfold.
"""

import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import plugins
from ..core.errors import UserError, suggest
from . import engines

DRIVERS, BUILDERS = Path(__file__).parent / "drivers", Path(__file__).parent / "builders"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serving engine, declared by one file in `headfold/serving/engines`.

    Attributes:
        name: the word for `--engine`; the file has the same name with `_` for `-`.
        title: the engine's own name.
        packages: the distributions that may bring it, for its version; the first that is installed is taken.
        reads: the value of `--layout` of the files that it reads, None where it reads checkpoint directories.
        number_type: what such files are to store matrices as, so that nothing is rounded; None for the checkpoint's own.
        install: the command that installs it.
        serve: returns the command that serves a path, given the config of the checkpoint.
        builder: the file of `headfold/serving/builders` by which the engine's own builder makes a model of a checkpoint; None where it has
            none.
        instead: the layout to export a checkpoint in that the engine does not read, by the field that its config has.
    """

    name: str
    title: str
    packages: Sequence[str]
    reads: str | None
    number_type: str | None = None
    install: str
    serve: Callable[[Path, Mapping[str, Any]], str]
    builder: str | None = None
    instead: Mapping[str, str] = field(default_factory=dict)

    @property
    def driver(self) -> Path:
        """The script that runs a model in it."""
        return DRIVERS / f"{self.name.replace('-', '_')}.py"


@functools.cache
def all_engines() -> Mapping[str, Engine]:
    """Return all engines by name."""
    found = [plugins.load(engines, page, Engine) for page in plugins.names(engines)]
    return {engine.name: engine for engine in found}


def engine_named(name: str) -> Engine:
    """Return one engine.

    Raises:
        UserError: none has this name; the nearest ones are suggested.
    """
    if name not in all_engines():
        raise UserError(
            f"--engine {name}: expected an engine that headfold knows; {suggest(name, list(all_engines()))}"
        )
    return all_engines()[name]


def quoted(path: Path) -> str:
    """Return a path as a word of a shell command."""
    return shlex.quote(str(path))


def in_python(code: str, path: Path, end: str = ")") -> str:
    """Return the command that runs a line of Python and stays there: `code`, the path as a string, `end`."""
    return f"python -i -c {shlex.quote(code + json.dumps(str(path), ensure_ascii=False) + end)}"


def brings_code(config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint brings a file of code, which its reader has to allow."""
    return bool(config.get("auto_map"))


def build(builder: str, words: str) -> str:
    """Return the command that runs a builder in the environment of its engine; the script imports nothing of headfold."""
    return f"python {quoted(BUILDERS / builder)} {words}"
