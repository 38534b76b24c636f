"""Refuse outputs that are in the way, and remove what an error left empty."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.staging import JOB
from ..core.errors import UserError
from ..parallel import is_main


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to overwrite a file that the user did not give up.

    Raises:
        UserError: a directory is there, or a file without `force`.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, got a directory")
    if path.exists() and not force:
        raise UserError(f"{path}: expected nothing there, got a file; choose another or pass --force to replace it")


@contextmanager
def removed_if_empty(staging: Path) -> Iterator[None]:
    """Remove a staging directory that holds nothing to resume from if the body is left by any exception, Ctrl-C too. Only rank 0 does."""
    try:
        yield
    except BaseException:
        if is_main():
            remove_if_empty(staging)
        raise


def remove_if_empty(staging: Path) -> None:
    """Remove a staging directory without files other than the mark of its job."""
    if staging.is_dir() and not any(path.is_file() and path.name != JOB for path in staging.rglob("*")):
        shutil.rmtree(staging)


def remove_output(out: Path) -> None:
    """Remove an output directory of ours and what is left of its staging directory; neither has to exist."""
    for left in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
