"""Code beside the weights, which engines would run."""

from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..runtime import remote

_LAYOUTS = Path(remote.__file__).parent
"""The folder of the classes that layouts bring along."""


def refuse_foreign_code(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config names code that this version of headfold did not write.

    Raises:
        UserError: it does.
    """
    named = checkpoint.config.get("auto_map") or {}
    for name in set(named.values()) if isinstance(named, Mapping) else {named}:
        file = checkpoint.path / f"{str(name).partition('.')[0]}.py"
        if not file.is_file() or file.read_text(errors="replace") != _ours(checkpoint, file.name):
            raise UserError(
                f"{checkpoint.path}: expected no code other than what this version of headfold writes, got {name} in auto_map, which "
                "engines would run; read it, then pass --trust-remote-code"
            )


def _ours(checkpoint: Checkpoint, name: str) -> str | None:
    """Return what headfold writes under a name beside this checkpoint; None where it writes nothing."""
    if "headfold" in checkpoint.config:
        return remote.remote_files(checkpoint.config).get(name)
    return (_LAYOUTS / name).read_text() if (_LAYOUTS / name).is_file() else None
