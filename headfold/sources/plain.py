"""What the user named, as a plain checkpoint directory: itself, or one that is made of it in the user's cache and used again."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.cards import CARD
from ..checkpoint.config import CONFIG
from ..checkpoint.disk import disk_errors, require_space, sizes
from ..checkpoint.entries import WEIGHTS, module_directories
from ..checkpoint.hub import GGUF, NamedDirectory, locate, locate_adapter
from ..checkpoint.ownership import Claim, PlaceOwned, claim, lock_beside
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import commit, copy_file, copy_side_files, open_staging, staging_of, write_json
from ..checkpoint.user_cache import cache_home
from ..core.errors import UserError
from ..core.json_input import read_object
from ..core.progress import Progress, counter, no_progress, silent
from .adapter import open_adapter
from .bases import check_base
from .gguf import open_gguf
from .merging import merge_adapter
from .packed import BESIDE, format_of, open_packed, settings_of
from .pickled import PICKLED, open_pickled
from .weights import Weights
from .writing import write_shards

MARK = ".headfold-source.json"
"""Lies in a finished directory of the cache: what it was made of, and the size of every file."""
_EDGE = 4096
_PIECES = 256
"""Number of pages of a large file that enter its digest, evenly spread."""
_SMALL = 2**24
"""Bytes of a file up to which all of it enters the digest."""
_PATIENCE = 1.0
"""Seconds between two looks whether another run has finished the same source."""
_LONGEST = 600.0
"""Seconds that another run may take without writing anything."""
_HINT = ": the fold starts from what quantisation left; quantise the fold again afterwards"
STAGE = "decode"
"""The stage of progress; it counts bytes."""
_REVISION = 2
"""Raised when the same source would be decoded to other weights."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A plain checkpoint of what the user named."""

    path: Path
    given: Path
    """The directory or file that the user named, or the snapshot of the hub id; outputs must not overlap it."""
    origin: str = ""
    """What the source was and what that means for the fold, in a line; empty where it was plain."""
    adapter: str = ""
    """The adapter whose weights are merged, as the user wrote it."""


def open_plain(
    model: object, adapter: str | None = None, progress: Progress = no_progress, say: Callable[[str], None] = silent
) -> Plain:
    """Return the plain checkpoint of a model: a directory, a hub id, or a GGUF file; with the weights of an adapter merged, if given.

    What is made lies in the user's cache under a name of the source's contents, and is found there the next time; of a model in memory,
    which no later run would find there, it lies where that was written. Tensors are decoded and written one at a time.
    `say` is called with a line on what was made, where, how large it is and what precision it had.

    Raises:
        UserError: neither model nor adapter can be read, or the cache is full or cannot be written to.
    """
    given = locate(model)
    lora = None if adapter is None else locate_adapter(adapter)
    opening = _how_to_open(given)
    if opening is None and lora is None:
        return Plain(given, given)
    place = _place(_home(model), given, lora)
    with _waiting(place) as owner:
        record = _finished(place)
        if record is None:
            weights = _as_it_is(given) if opening is None else opening()
            if lora is not None:
                opened = open_adapter(lora)
                check_base(opened, given, weights.config)
                weights = merge_adapter(weights, opened, given)
            assert owner is not None
            record = _make(weights, place, progress)
    origin = str(record["origin"])
    where = "a temporary directory" if isinstance(model, NamedDirectory) else place
    say(f"{model}: {origin}; {sizes(record['bytes'])} in {where}")
    return Plain(place, given, origin, adapter or "")


def _how_to_open(given: Path) -> Callable[[], Weights] | None:
    """Return what opens weights that are to be decoded; None for a plain checkpoint, and for what `Checkpoint.open` refuses."""
    if given.is_file():
        return partial(open_gguf, given)
    names = {entry.name for entry in given.iterdir()}
    if not names & {*WEIGHTS}:
        files = sorted(name for name in names if name.lower().endswith(GGUF))
        if len(files) == 1:
            return partial(open_gguf, given / files[0])
        if files:
            raise UserError(f"{given}: expected one GGUF file, got {len(files)}; pass one of them: {given / files[0]}")
        return partial(open_pickled, given) if names & {*PICKLED} and CONFIG in names else None
    settings = settings_of(given) if CONFIG in names else None
    page = None if settings is None else format_of(settings)
    return None if page is None or settings is None else partial(open_packed, given, page, settings)


def _as_it_is(directory: Path) -> Weights:
    """Return the weights of a plain checkpoint."""
    checkpoint = Checkpoint.open(directory)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.tensors:
            yield name, checkpoint.read(name)

    return Weights(
        checkpoint.config, tuple(checkpoint.tensors), checkpoint.num_bytes, tensors, directory, "", quantised=False
    )


def _home(model: object) -> Path:
    """Return the directory of what is made: the user's cache, or the temporary directory of a model in memory."""
    if isinstance(model, NamedDirectory):
        return model.path.parent
    try:
        return cache_home()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cache: expected a directory of your own to keep decoded weights in, got none ({error}); set XDG_CACHE_HOME"
        ) from error


def _place(home: Path, given: Path, adapter: Path | None) -> Path:
    """Return the directory in a home: of the source's contents, and, as its last part, of the source's name."""
    digest = hashlib.sha256(f"{version('headfold')} {_REVISION}".encode())
    for source in filter(None, (given, adapter)):
        _digest(source, digest.update)
    name = given.stem if given.is_file() else given.resolve().name
    return home / "sources" / digest.hexdigest()[:32] / (name or "model")


def _digest(source: Path, update: Callable[[bytes], None]) -> None:
    """Take in the names and contents of a file, or of the files of a directory and of those of its modules; of large ones the size, the
    date and some pages."""
    directories = [source, *(source / module for module in module_directories(source))]
    files = [each for directory in directories for each in sorted(directory.iterdir())] if source.is_dir() else [source]
    for path in filter(Path.is_file, files):
        found = path.stat()
        update(f"\n{path.relative_to(source)} {found.st_size}\n".encode())
        with path.open("rb", buffering=0) as file:
            if found.st_size <= _SMALL:
                update(file.read())
                continue
            update(f"{found.st_mtime_ns}\n".encode())
            for piece in range(_PIECES):
                update(os.pread(file.fileno(), _EDGE, piece * (found.st_size - _EDGE) // (_PIECES - 1)))


@contextmanager
def _waiting(place: Path) -> Iterator[Claim | None]:
    """Own a place of the cache, after waiting for another run that makes the same; None if that has finished it.

    Raises:
        UserError: the other run has not written anything for a while.
    """
    owner: Claim | None = None
    seen, since = -1, time.monotonic()
    while owner is None and _finished(place) is None:
        try:
            owner = claim(place, lock_beside(place))
        except PlaceOwned:
            if (written := _bytes_in(staging_of(place))) != seen:
                seen, since = written, time.monotonic()
            if time.monotonic() - since > _LONGEST:
                raise
            time.sleep(_PATIENCE)
    try:
        yield owner
    finally:
        if owner is not None:
            owner.release()


def _bytes_in(directory: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in directory.iterdir())
    except OSError:  # not there, or being renamed
        return 0


def _finished(place: Path) -> Mapping[str, Any] | None:
    """Return the record of a directory that is whole: its files have the sizes that they were written with."""
    try:
        record = read_object(place / MARK)
        files = record["files"]
        whole = isinstance(files, dict) and all((place / name).stat().st_size == size for name, size in files.items())
        return record if whole and isinstance(record["origin"], str) and isinstance(record["bytes"], int) else None
    except (OSError, UserError, KeyError):
        return None


def _make(weights: Weights, place: Path, progress: Progress) -> Mapping[str, Any]:
    """Write the plain checkpoint of a source into the cache, and return its record.

    Raises:
        UserError: the source has a part that cannot be decoded, or the cache is full.
    """
    with disk_errors(place):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = open_staging(place, os.urandom(16).hex(), force=True)
    try:
        _require_space(staging, weights.num_bytes)
        if weights.beside is not None:
            copy_side_files(weights.beside, staging)
            (staging / BESIDE).unlink(missing_ok=True)
            if (weights.beside / CARD).is_file():
                copy_file(weights.beside / CARD, staging / CARD)
        if weights.write_tokenizer is not None:
            weights.write_tokenizer(staging)
        write_json(staging / CONFIG, weights.config)
        count = write_shards(staging, weights.names, weights.tensors(), counter(progress, STAGE, weights.num_bytes))
        files = {path.name: path.stat().st_size for path in staging.iterdir() if not path.name.startswith(".")}
        record = {"origin": weights.origin + (_HINT if weights.quantised else ""), "bytes": count, "files": files}
        write_json(staging / MARK, record)
        commit(staging, place, force=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return record


def _require_space(staging: Path, num_bytes: int) -> None:
    try:
        require_space(staging, num_bytes)
    except UserError as error:
        raise UserError(
            f"{error}; XDG_CACHE_HOME names the directory of caches, TMPDIR that of models in memory"
        ) from error
