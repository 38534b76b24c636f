"""Write a checkpoint with some tensors replaced: the kernel copies untouched bytes, and one site at a time is in memory."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import UserError
from .disk import disk_errors, flush, require_space
from .reader import INDEX, Checkpoint
from .shards import NOTHING, Run, Shard, lay_out
from .staging import write_json
from .target import Source, Target
from .transfer import raw_bytes

COPIERS = 4
"""Threads that copy: while one waits for the disk to read, others write."""
PIECE = 2**28
"""Bytes that a thread copies at a time."""


def _no_report(num_bytes: int) -> None:
    del num_bytes


def output_bytes(
    source: Checkpoint, shapes: Mapping[str, tuple[int, ...]], instead: Mapping[str, Sequence[str]] = NOTHING
) -> int:
    """Return the bytes of all shards that `rewrite` writes, headers included: the total of its `progress`."""
    return sum(lay_out(source, name, shapes, instead).size for name in source.shards)


def rewrite(
    source: Checkpoint,
    target: Path,
    shapes: Mapping[str, tuple[int, ...]],
    owner: Mapping[str, str],
    produce: Callable[[str], Mapping[str, Tensor]],
    progress: Callable[[int], None] = _no_report,
    instead: Mapping[str, Sequence[str]] = NOTHING,
) -> None:
    """Write shards of the source's names and contents, and the index, into the existing directory `target`.

    `shapes` gives the new shapes of the tensors to replace (`instead`, those that replace one of another name), `owner` the site
    that produces each, `produce` all tensors of a site in the source's dtype. Sites are produced in the order in which the shards
    need them, each at most once. A shard gets its name when it is complete on the disk, so a second call after a kill writes only
    the missing ones, with the same bytes. `progress` is called with the number of new bytes, by two threads but never at the same
    time.

    Raises:
        UserError: there is not enough space, or the place cannot be written to.
    """
    shards = [lay_out(source, name, shapes, instead) for name in source.shards]
    todo = [shard for shard in shards if not shard.is_written(target)]
    for shard in shards:
        if shard not in todo:
            progress(shard.size)
    needed = sum(shard.size for shard in todo)
    with disk_errors(target, needed):
        for shard in todo:
            _partial(target, shard).unlink(missing_ok=True)
        require_space(target, needed)
        _write(source, target, todo, _Sites(owner, produce), progress)
        if source.index is not None:
            write_json(target / INDEX, _new_index(source, shapes, instead))


@dataclass(frozen=True, slots=True)
class _Sites:
    """Which site produces which tensor, and how."""

    owner: Mapping[str, str]
    produce: Callable[[str], Mapping[str, Tensor]]

    def needed_by(self, shard: Shard) -> list[str]:
        return list(dict.fromkeys(self.owner[name] for name in shard.tensors))


class _Stopped(Exception):
    """Ends the copying threads after the computing one has failed."""


def _write(
    source: Checkpoint, target: Path, shards: list[Shard], sites: _Sites, progress: Callable[[int], None]
) -> None:
    """Write all shards: this thread computes sites, others copy the untouched bytes, one waits for the disk and renames complete
    files."""
    stop, lock = threading.Event(), threading.Lock()

    def report(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            progress(count)

    with ExitStack() as stack:
        files = {shard.name: stack.enter_context(_create(target, shard)) for shard in shards}
        copier, closer = (stack.enter_context(ThreadPoolExecutor(number)) for number in (COPIERS, 1))
        stack.callback(stop.set)
        copies = {
            shard.name: [
                copier.submit(_copy_untouched, source.path / shard.name, runs, files[shard.name], report)
                for runs in _pieces(shard, files[shard.name])
            ]
            for shard in shards
        }
        places = {name: (files[shard.name], info) for shard in shards for name, info in shard.tensors.items()}
        done: set[str] = set()
        closed: list[Future[None]] = []
        for shard in shards:
            report(len(shard.header))
            for site in sites.needed_by(shard):
                if site not in done:
                    _raise_failed([*chain.from_iterable(copies.values()), *closed])
                    _write_site(sites.produce(site), places, report)
                    done.add(site)
            closed.append(closer.submit(_close, target, shard, files[shard.name], copies[shard.name]))
        for future in closed:
            future.result()


def _raise_failed(futures: Iterable[Future[None]]) -> None:
    """Raise the error of a copy that has failed, so that a full disk stops the computation too."""
    for future in futures:
        if future.done():
            future.result()


@contextmanager
def _create(target: Path, shard: Shard) -> Iterator[Target]:
    """Create the file at its full size, with its header."""
    file = Target(_partial(target, shard), shard.size)
    try:
        file.write(shard.header, 0)
        yield file
    finally:
        file.abandon()


def _pieces(shard: Shard, file: Target) -> Iterator[tuple[Run, ...]]:
    """Yield the untouched bytes in portions for the copying threads; all at once if the threads would share a file position."""
    if not file.is_direct:
        yield shard.runs
        return
    for run in shard.runs:
        for done in range(0, run.count, PIECE):
            yield (Run(run.start + done, run.place + done, min(PIECE, run.count - done)),)


def _copy_untouched(path: Path, runs: Iterable[Run], target: Target, report: Callable[[int], None]) -> None:
    with Source(path) as source:
        for run in runs:
            try:
                target.copy(source, run.start, run.place, run.count, report)
            except EOFError as error:
                raise UserError(f"{path}: truncated while it was copied: {error}; start again") from error


def _write_site(made: Mapping[str, Tensor], places: Mapping[str, Any], report: Callable[[int], None]) -> None:
    """Write every tensor of a site to its place, in any shard; those of complete shards are skipped."""
    for name in made.keys() & places.keys():
        file, info = places[name]
        tensor = made[name].detach().cpu().contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), (name, tensor.dtype, tensor.shape, info)
        file.write(raw_bytes(tensor), info.start)
        report(info.end - info.start)


def _close(target: Path, shard: Shard, file: Target, copies: Iterable[Future[None]]) -> None:
    for copied in copies:
        copied.result()
    file.close()
    _partial(target, shard).rename(target / shard.name)
    flush(target)


def _partial(target: Path, shard: Shard) -> Path:
    return target / f"{shard.name}.partial"


def _new_index(
    source: Checkpoint, shapes: Mapping[str, tuple[int, ...]], instead: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return the source's index with updated names and sizes: bytes, and parameters if it counts them."""
    assert source.index is not None
    replacements = {name: instead.get(name, (name,)) for name in source.tensors}
    touched = [name for name in replacements if name in instead or name in shapes]
    fewer = {
        name: math.prod(source.tensors[name].shape)
        - sum(math.prod(shapes[new_name]) for new_name in replacements[name])
        for name in touched
    }
    metadata = dict(source.index.get("metadata") or {})
    saved = sum(count * source.tensors[name].dtype.itemsize for name, count in fewer.items())
    metadata["total_size"] = source.num_bytes - saved
    if "total_parameters" in metadata:
        metadata["total_parameters"] -= sum(fewer.values())
    weight_map = {
        new_name: shard for name, shard in source.index["weight_map"].items() for new_name in instead.get(name, (name,))
    }
    return {**source.index, "metadata": metadata, "weight_map": weight_map}
