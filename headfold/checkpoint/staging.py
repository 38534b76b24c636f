"""Output directories that are never half-written: they are built beside their place under another name and renamed at the end."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import AlreadyFinished, UserError
from .cards import CARD
from .disk import disk_errors, flush, replacing
from .entries import module_directories

JOB = ".headfold-job"
_FINISHED = " finished"
"""Ends the mark of a job whose output is whole, from before the renaming until the mark is removed."""

_NEW_MARK = f"{JOB}-new"
_PIECE = 2**20
"""Bytes that are copied at a time."""
Publish = Callable[[], str]
"""Uploads a whole output from its place, and returns a line that says where it is then."""
_WRITTEN_ANEW = {"config.json", CARD, "plan.json", "headfold.yaml"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data"}


def open_staging(out: Path, key: str, force: bool, publish: Publish | None = None, *, resumes: bool = True) -> Path:
    """Return the directory `OUT.partial/` in which a job builds `out`, created or found from an earlier run.

    `key` identifies the job: files of an earlier run of the same job are kept if it `resumes`; those of another one are removed.
    `publish` as in `commit`.

    Raises:
        AlreadyFinished: an earlier run of the same job was killed while it moved or published its whole output; it lies in its place now,
            and is published.
        UserError: `out` is a file or a link, or has contents and `force` is not given; `OUT.partial` was not made by headfold, or others
            may have written to it; the place cannot be written to.
    """
    place, staging = _absolute(out), staging_of(out)
    with disk_errors(out):
        _undo_half_commit(place)
        for earlier in (staging, place):
            if (earlier / JOB).is_file() and not earlier.is_symlink():
                _refuse_strangers(earlier)
        _finish_commit(place, staging, out, key, force, publish)
        _refuse_taken(place, out, force)
        if staging.is_symlink() or (os.path.lexists(staging) and not staging.is_dir()):
            raise _not_ours(staging)
        staging.mkdir(parents=True, exist_ok=True)
        _adopt(staging, key, resumes)
    return staging


def check_place(out: Path, force: bool) -> None:
    """Check that `open_staging` would not refuse the output, before anything of an earlier run is touched.

    Raises:
        UserError: `out` is a file or a link, or has contents and `force` is not given.
    """
    place = _absolute(out)
    with disk_errors(out):
        if not place.is_symlink() and _job_of(place).endswith(_FINISHED):
            return  # what a kill left of a commit, which is looked at when the job is known
        _refuse_taken(place, out, force)


def is_of_job(out: Path, key: str) -> bool:
    """Return whether `OUT.partial` holds what an earlier run of the same job left."""
    staging = staging_of(out)
    return not staging.is_symlink() and _job_of(staging) == key


def holds_other_job(out: Path, key: str, force: bool) -> bool:
    """Return whether `OUT.partial` holds what an earlier run of another job left, which `open_staging` would remove."""
    try:
        check_place(out, force)
    except UserError:  # refused again under the lock, so that one that a kill left behind is removed
        return False
    staging = staging_of(out)
    return not staging.is_symlink() and _job_of(staging).removesuffix(_FINISHED) not in ("", key)


def staging_of(out: Path) -> Path:
    """Return the directory in which `out` is built."""
    place = _absolute(out)
    return place.with_name(f"{place.name}.partial")


def job_key(settings: Mapping[str, Any]) -> str:
    """Return the key of a job: the same for the same settings, in any order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def commit(staging: Path, out: Path, force: bool, publish: Publish | None = None) -> str:
    """Move the finished directory to its place; with `force`, what was there is removed after that. Return what `publish` returns.

    The mark of the job is removed last: where `publish` fails or is killed, the next run of the same job finds the output whole and
    publishes it.

    Raises:
        UserError: something has appeared at `out` meanwhile, or the place cannot be written to; else as `publish`.
    """
    place = _absolute(out)
    with disk_errors(out):
        _refuse_taken(place, out, force)
        mode = (staging / JOB).stat().st_mode
        for entry in staging.iterdir():
            if entry.is_file():
                # By the umask, as the mark was made: safetensors writes files that only their owner can read.
                entry.chmod(mode)
                flush(entry)
        _mark(staging, _job_of(staging).removesuffix(_FINISHED) + _FINISHED)
        aside = _aside(place)
        if place.exists() and any(place.iterdir()):
            _remove(aside)
            place.rename(aside)
        _rename_or_undo(staging, place, aside)
        return _clear_up(place, force, publish)


def wrong_output(staging: Path, found: str, advice: str = "") -> UserError:
    """Return the error of an output that is not as it should be, after marking it: it stays for inspection, but no job resumes from it.

    `found` says what was expected of it, and what was got.
    """
    with disk_errors(staging):
        _mark(staging, "wrong")
    return UserError(f"{staging}: {found}; left there and not renamed{advice}")


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

    Weights of any format with their indexes, files that a fold writes itself, hidden files and directories are left out, but for the
    directories of a sentence-transformers model, such as `1_Pooling`, with all that is in them.
    """
    names = sorted(entry.name for entry in Path(source).iterdir() if entry.is_file() and _is_side_file(entry.name))
    names += [
        f"{module}/{file.name}"
        for module in module_directories(source)
        for file in sorted((source / module).iterdir())
        if file.is_file()
    ]
    for name in names:
        copy_file(Path(source) / name, target / name)
    return names


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; an error names the side on which it happened."""
    with disk_errors(target):
        target.parent.mkdir(exist_ok=True)
        with target.open("wb") as written:
            for piece in _pieces(source):
                written.write(piece)


def _pieces(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise UserError(
            f"{source}: cannot be read ({error.strerror}), but belongs to the output; mend or remove it"
        ) from error


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` to `path` in one step: the file is never incomplete."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _finish_commit(place: Path, staging: Path, out: Path, key: str, force: bool, publish: Publish | None) -> None:
    """Do what is left of a commit of the same job that was killed in the middle.

    Raises:
        AlreadyFinished: it is done; there was such a commit.
    """
    if not place.is_symlink() and _job_of(place) == key + _FINISHED:
        said = _clear_up(place, force, publish)
    elif not staging.is_symlink() and _job_of(staging) == key + _FINISHED:
        said = commit(staging, out, force, publish)
    else:
        return
    raise AlreadyFinished(f"{out}: an earlier run of the same job finished this; {said or 'nothing is left to do'}")


def _clear_up(place: Path, force: bool, publish: Publish | None) -> str:
    # The mark is removed last, so that whatever happens before never leaves a directory that the next run refuses as not made by
    # headfold: it finds the mark here.
    flush(place.parent)
    if force:
        _remove(_aside(place))
    said = publish() if publish else ""
    (place / JOB).unlink()
    return said


def _refuse_taken(place: Path, out: Path, force: bool) -> None:
    if place.is_symlink():  # a directory cannot be renamed to the name of a link
        raise UserError(
            f"{out}: expected a directory to write or nothing, got a symbolic link; name the place that it leads to, or another"
        )
    if os.path.lexists(place) and not place.is_dir():
        raise UserError(f"{out}: expected a directory to write or nothing, got a file; choose another output place")
    if place.is_dir() and _cannot_be_replaced(place):
        raise UserError(
            f"{out}: expected nothing there or a directory of your own, got another user's; choose another output place"
        )
    if place.is_dir() and any(place.iterdir()) and not force:
        raise UserError(
            f"{out}: expected nothing there, got a directory with contents; choose another or pass --force to replace it"
        )


def _cannot_be_replaced(place: Path) -> bool:
    """Return whether a directory is another user's in a place such as /tmp, where each may rename their own alone."""
    parent, user = place.parent.stat(), os.geteuid()
    return bool(parent.st_mode & stat.S_ISVTX) and user not in (0, parent.st_uid, place.stat().st_uid)


def _adopt(staging: Path, key: str, resumes: bool) -> None:
    """Make the directory this job's: keep its own files if it `resumes`, remove others, refuse a directory that headfold did not make."""
    job = staging / JOB
    if job.is_file():
        if resumes and _job_of(staging) == key:
            return
        for entry in staging.iterdir():
            if entry != job:
                _remove(entry)
    elif any(entry.name != _NEW_MARK for entry in staging.iterdir()):
        raise _not_ours(staging)
    _mark(staging, key)


def _job_of(directory: Path) -> str:
    """Return the mark of the job that a directory belongs to; an empty one where it has none."""
    job = directory / JOB
    return job.read_text(errors="replace") if job.is_file() else ""


def _mark(staging: Path, text: str) -> None:
    """Say in one step whose directory this is, so that a kill never leaves half a mark, which no run would know for its own."""
    new = staging / _NEW_MARK
    new.write_text(text)
    flush(new)
    new.replace(staging / JOB)


def _refuse_strangers(directory: Path) -> None:
    """Refuse to go on from files in a directory of another user, or in one that every user may write to.

    Raises:
        UserError: as said.
    """
    # What a new file looks like here: some file systems show one owner and one mode for all files.
    probe = directory / _NEW_MARK
    probe.unlink(missing_ok=True)
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    ours, found = probe.stat(), directory.stat()
    probe.unlink()
    open_to_all = found.st_mode & stat.S_IWOTH and not ours.st_mode & stat.S_IWOTH
    if found.st_uid != ours.st_uid or open_to_all:
        whose = "one that every user may write to" if open_to_all else "another user's"
        raise UserError(
            f"{directory}: expected your own directory of an earlier run to go on from, got {whose}; remove it, or choose another output "
            "place"
        )


def _not_ours(staging: Path) -> UserError:
    found = "a symbolic link" if staging.is_symlink() else "something that headfold did not make"
    return UserError(f"{staging}: expected a free place to build the output in, got {found}; move it away")


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
