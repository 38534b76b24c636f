"""Output directories that are never half-written: they are built beside their place under another name and renamed at the end."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .disk import disk_errors, flush

JOB = ".headfold-job"

_WRITTEN_ANEW = {"config.json", "README.md", "plan.json"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}


def open_staging(out: Path, key: str, force: bool) -> Path:
    """Return the directory `OUT.partial/` in which a job builds `out`, created or found from an earlier run.

    `key` identifies the job: files of an earlier run of the same job are kept, those of another one removed.

    Raises:
        UserError: `out` is a file, or has contents and `force` is not given; `OUT.partial` was not made by headfold; the place
            cannot be written to.
    """
    place = _absolute(out)
    with disk_errors(out):
        _undo_half_commit(place)
        _refuse_taken(place, out, force)
        staging = place.with_name(f"{place.name}.partial")
        if os.path.lexists(staging) and not staging.is_dir():
            raise _not_ours(staging)
        staging.mkdir(parents=True, exist_ok=True)
        _adopt(staging, key)
    return staging


def job_key(settings: Mapping[str, Any]) -> str:
    """Return the key of a job: the same for the same settings, in any order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def commit(staging: Path, out: Path, force: bool) -> None:
    """Move the finished directory to its place; with `force`, what was there is removed after that.

    Raises:
        UserError: something has appeared at `out` meanwhile, or the place cannot be written to.
    """
    place = _absolute(out)
    with disk_errors(out):
        _refuse_taken(place, out, force)
        for entry in staging.iterdir():
            if entry.is_file():
                flush(entry)
        aside = _aside(place)
        if place.exists() and any(place.iterdir()):
            _remove(aside)
            place.rename(aside)
        _rename_or_undo(staging, place, aside)
        # After the renaming, so that a kill between the two never leaves a directory that the next run refuses as not made by headfold.
        (place / JOB).unlink()
        flush(place.parent)
        if force:
            _remove(aside)


def disown(staging: Path) -> None:
    """Mark what was built as wrong: it stays for inspection, but no job resumes from it."""
    with disk_errors(staging):
        (staging / JOB).write_text("wrong")


def refuse_overlap(source: Path, out: Path) -> None:
    """Refuse an output that is the source, is inside it or contains it.

    Raises:
        UserError: they overlap.
    """
    source, place = Path(source).resolve(), Path(out).resolve()
    if source == place or source in place.parents or place in source.parents:
        raise UserError(
            f"{out}: expected an output place apart from the source, got one that overlaps {source}; choose another"
        )


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the files beside the weights (tokenizer, generation config, chat template, licence …); return their names.

    Weights of any format with their indexes, files that a fold writes itself, hidden files and directories are left out.
    """
    names = sorted(entry.name for entry in Path(source).iterdir() if entry.is_file() and _is_side_file(entry.name))
    with disk_errors(target):
        for name in names:
            shutil.copyfile(Path(source) / name, target / name)
    return names


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` to `path` in one step: the file is never incomplete."""
    temporary = path.with_name(f"{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        flush(temporary)
        temporary.replace(path)


def _is_side_file(name: str) -> bool:
    return not (
        name in _WRITTEN_ANEW
        or name.startswith(".")
        or Path(name).suffix in _WEIGHTS
        or name.endswith((".index.json", ".partial"))
    )


def _absolute(out: Path) -> Path:
    """Return the path normalised without following links: `..` and a trailing slash have no name to append a suffix to."""
    return Path(os.path.abspath(out))


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.headfold-replaced")


def _undo_half_commit(place: Path) -> None:
    """Put the old directory back if a kill between the two renamings of `commit` left it aside."""
    if _aside(place).exists() and not os.path.lexists(place):
        _aside(place).rename(place)


def _refuse_taken(place: Path, out: Path, force: bool) -> None:
    if os.path.lexists(place) and not place.is_dir():
        raise UserError(f"{out}: expected a directory to write or nothing, got a file; choose another output place")
    if place.is_dir() and any(place.iterdir()) and not force:
        raise UserError(
            f"{out}: expected nothing there, got a directory with contents; choose another or pass --force to replace it"
        )


def _adopt(staging: Path, key: str) -> None:
    """Make the directory this job's: keep its own files, remove another job's, refuse a directory that headfold did not make."""
    job = staging / JOB
    if job.is_file():
        if job.read_text(errors="replace") == key:
            return
        for entry in staging.iterdir():
            if entry != job:
                _remove(entry)
    elif any(staging.iterdir()):
        raise _not_ours(staging)
    job.write_text(key)


def _not_ours(staging: Path) -> UserError:
    return UserError(
        f"{staging}: expected a free place to build the output in, got something that headfold did not make; move it away"
    )


def _rename_or_undo(staging: Path, place: Path, aside: Path) -> None:
    try:
        staging.rename(place)
    except OSError:
        _undo_half_commit(place)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
