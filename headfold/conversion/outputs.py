"""Own an output while it is written, refuse what is in the way, and remove what an error left empty."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoint.ownership import claim, lock_beside, lock_inside
from ..checkpoint.staging import JOB, open_staging, staging_of
from ..core.errors import SourceError, UserError
from ..parallel import is_main, on_main, on_main_only


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to overwrite a file that the user did not give up.

    Raises:
        UserError: a directory is there, or a file without `force`.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, got a directory")
    if (path.exists() or path.is_symlink()) and not force:
        raise UserError(f"{path}: expected nothing there, got a file; choose another or pass --force to replace it")


@contextmanager
def staged(out: Path, key: str, force: bool) -> Iterator[Path]:
    """Own `out` and yield the directory in which a job builds it, as `open_staging` finds it; it is removed if an error leaves it empty.

    Raises:
        UserError: another run writes to `out`; else as `open_staging`.
    """
    with _owned(out, lock_beside(out)):
        staging = on_main(lambda: open_staging(out, key, force))
        with removed_if_empty(staging):
            yield staging


@contextmanager
def owned_directory(directory: Path) -> Iterator[None]:
    """Own an output directory that is filled where it is; it is created, and removed if it stays empty.

    Raises:
        UserError: another run writes there.
    """
    is_ours = is_main() and not directory.exists()
    try:
        with _owned(directory, lock_inside(directory)):
            yield
    finally:
        if is_ours:
            with suppress(OSError):  # it has contents, or could not be made
                directory.rmdir()


@contextmanager
def owned_file(path: Path, force: bool) -> Iterator[None]:
    """Own an output file while it is written.

    Raises:
        UserError: another run writes it; else as `refuse_existing`.
    """
    # Refused under the lock, so that one that a kill left behind is taken over and removed even where the file is whole.
    with _owned(path, lock_beside(path)):
        refuse_existing(path, force)
        yield


@contextmanager
def _owned(out: Path, lock: Path) -> Iterator[None]:
    """Own an output place: rank 0 for all ranks, until the body is left."""
    owner = on_main_only(lambda: claim(out, lock))
    try:
        yield
    finally:
        if owner is not None:
            owner.release()


@contextmanager
def removed_if_empty(staging: Path) -> Iterator[None]:
    """Remove a staging directory that holds nothing to resume from if the body is left by any exception, Ctrl-C too. Only rank 0 does."""
    try:
        yield
    except SourceError:
        if is_main():
            shutil.rmtree(staging, ignore_errors=True)
        raise
    except BaseException:
        if is_main():
            _remove_if_empty(staging)
        raise


def _remove_if_empty(staging: Path) -> None:
    """Remove a staging directory without files other than the mark of its job."""
    if staging.is_dir() and not any(path.is_file() and path.name != JOB for path in staging.rglob("*")):
        shutil.rmtree(staging)


def remove_output(out: Path) -> None:
    """Remove an output directory of ours and what is left of its staging directory; neither has to exist."""
    for left in (out, staging_of(out)):
        shutil.rmtree(left, ignore_errors=True)
