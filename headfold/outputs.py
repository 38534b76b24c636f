"""Own an output while it is written, refuse what is in the way, and remove what an error left empty."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint.ownership import claim, lock_beside, lock_inside
from .checkpoint.staging import JOB, Publish, commit, open_staging, staging_of
from .core.errors import SourceError, UserError
from .parallel import is_main, on_main, on_main_only

KEPT = "; what was done until then is kept in "
"""Ends an error after which the same job goes on from its staging directory, whose name follows."""
_WORK = ".headfold-work"


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to overwrite a file that the user did not give up.

    Raises:
        UserError: a directory is there, or a file without `force`.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, got a directory")
    if (path.exists() or path.is_symlink()) and not force:
        raise UserError(f"{path}: expected nothing there, got a file; choose another or pass --force to replace it")


def refuse_existing_early(path: Path, force: bool) -> None:
    """Refuse the same before anything is computed; where a kill left a lock, `owned_file` does, which removes that first.

    Raises:
        UserError: as `refuse_existing`.
    """
    if not lock_beside(path).exists():
        refuse_existing(path, force)


@contextmanager
def staged(out: Path, key: str, force: bool, publish: Publish | None = None, *, resumes: bool = True) -> Iterator[Path]:
    """Own `out` and yield the directory in which a job builds it, as `open_staging` finds it, or as a kill of another run of it left it.

    After an error it stays if the same job can go on from it, that is, if the job `resumes`. `publish` is called where an earlier run
    left the output whole, but did not come to that.

    Raises:
        UserError: another run writes to `out`; else as `open_staging`.
    """
    with _owned(out, lock_beside(out)):
        staging = on_main(lambda: open_staging(out, key, force, publish, resumes=resumes))
        with removed_on_error(staging, resumes=resumes):
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
        on_main(lambda: refuse_existing(path, force))
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
def removed_on_error(staging: Path, *, resumes: bool = True) -> Iterator[None]:
    """Remove a staging directory from which no run can go on if the body is left by any exception, Ctrl-C too. Only rank 0 does.

    That is one without files, one of a job that never resumes, and one of an original with which the job never succeeds. Otherwise a
    `UserError` says that the directory stays; an output that is wrong says so itself.
    """
    try:
        yield
    except UserError as error:
        if not is_main() or str(staging) in str(error):
            raise
        _remove(staging, everything=not resumes or isinstance(error, SourceError))
        if staging.is_dir():
            said = f"{error}{KEPT}{staging}"
            raise type(error)(said) from error
        raise
    except BaseException:
        if is_main():
            _remove(staging, everything=not resumes)
        raise


def _remove(staging: Path, *, everything: bool) -> None:
    """Remove a staging directory, or else one without files other than the mark of its job."""
    if everything or not any(path.is_file() and path.name != JOB for path in staging.rglob("*")):
        shutil.rmtree(staging, ignore_errors=True)


def remove_output(out: Path) -> None:
    """Remove an output directory of ours and what is left of its staging directory; neither has to exist."""
    for left in (out, staging_of(out)):
        shutil.rmtree(left, ignore_errors=True)


@dataclass(slots=True)
class StagedJob:
    """The staging directory of one output, as `staged` yields it, with what is computed on the way and how long it takes."""

    staging: Path
    seconds: dict[str, float] = field(default_factory=dict, kw_only=True)
    """Seconds by stage."""
    publish: Publish | None = field(default=None, kw_only=True)
    """What is done with the whole output."""

    @property
    def work(self) -> Path:
        """The directory of statistics and fitted sites while the output grows; removed before the output is renamed."""
        return self.staging / _WORK

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that a stage takes, without those of stages inside it."""
        started, before = time.monotonic(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - before
        self.seconds[stage] = round(self.seconds.get(stage, 0) + time.monotonic() - started - inside, 3)

    def committed(self, out: Path, force: bool, say: Callable[[str], None]) -> list[str]:
        """Remove `work`, move the finished directory to its place, upload it if a repository was named; return what there is to say."""
        shutil.rmtree(self.work)
        if self.publish:
            say(f"{out}: complete; uploading it, which the same command does again if it is interrupted")
        said = commit(self.staging, out, force, self.publish)
        return [said] if said else []
