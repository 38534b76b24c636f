"""What a checkpoint directory may contain: regular files of its own, so that opening or copying it reads nothing else of the machine."""

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import UserError
from ..core.files import kind_of_file
from ..core.json_input import read_list
from .modules import MODULES

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""The weights of a checkpoint: one file, or the index of several."""
_TEMPLATES = "additional_chat_templates"
"""Directory from which transformers reads chat templates."""
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def check_entries(directory: Path) -> None:
    """Refuse a checkpoint directory that would lead what reads it elsewhere.

    Checked are the visible entries of the directory, of the directories that `modules.json` lists and of that of the chat templates;
    nothing else is read. A link may lead to a file of the directory, and in a snapshot of the hub's cache to a blob of its repository.

    Raises:
        UserError: a FIFO, a device or a socket; a link that leads out of the directory, or to nothing; a module outside of it; an
            adapter beside the full weights.
    """
    for entry in _visible(directory):
        _check_entry(entry, directory)
    _refuse_adapter(directory)
    for path in _listed_modules(directory):
        if "\0" in path or not _is_inside(directory / path, directory):
            raise UserError(
                f"{directory / MODULES}: expected modules inside the directory, got {path!r}; correct the file"
            )
        for entry in _visible(directory / path) if path else ():
            _check_entry(entry, directory)
    for entry in _visible(directory / _TEMPLATES):
        _check_entry(entry, directory)


def module_directories(directory: Path) -> list[str]:
    """Return the directories that `modules.json` lists after the model itself; a list that cannot be read lists none."""
    # A name of one part, so that nothing outside the checkpoint is read.
    listed = (path for path in _listed_modules(directory) if "\0" not in path)
    inside = {path for path in listed if path and path == Path(path).name and path[0] != "."}
    return sorted(path for path in inside if (directory / path).is_dir() and not (directory / path).is_symlink())


def _listed_modules(directory: Path) -> list[str]:
    try:
        return [str(module["path"]) for module in read_list(directory / MODULES)]
    except (OSError, UserError, TypeError, KeyError):
        return []


def _visible(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from (entry for entry in sorted(directory.iterdir()) if not entry.name.startswith("."))


def _check_entry(entry: Path, directory: Path) -> None:
    is_link = entry.is_symlink()
    if is_link and not entry.exists():
        raise UserError(f"{entry}: expected a file, got a link to nothing; download or copy the checkpoint again")
    mode = entry.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{entry}: expected a file, got {kind_of_file(mode)}; remove it from the checkpoint directory")
    is_read = stat.S_ISREG(mode) or entry.name == _TEMPLATES
    if is_link and is_read and not _is_inside(entry, directory) and not _is_blob(entry, directory):
        raise UserError(
            f"{entry}: expected a file of the checkpoint, got a link that leads out of its directory, to {entry.resolve()}; if that is "
            "meant, put a copy of the file in its place"
        )


def _is_inside(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def _is_blob(entry: Path, directory: Path) -> bool:
    """Return whether a link leads to where the hub client keeps the files of this snapshot: `REPOSITORY/blobs`, or, for several
    repositories together, `CACHE/blobs/12/<hash>`."""
    snapshot, target = directory.resolve(), entry.resolve()
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    shared = repository.parent / "blobs"
    return target.parent == repository / "blobs" or (
        target.is_relative_to(shared) and _SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix()) is not None
    )


def _refuse_adapter(directory: Path) -> None:
    """Refuse full weights with an adapter beside them, which transformers would apply to them unasked."""
    config = directory / "adapter_config.json"
    if config.exists() and any((directory / name).exists() for name in WEIGHTS):
        raise UserError(
            f"{config}: expected full weights alone, got an adapter beside them, which transformers would apply; merge it into the model "
            "(peft: merge_and_unload, then save_pretrained), or move adapter_config.json away to use the weights without it"
        )
