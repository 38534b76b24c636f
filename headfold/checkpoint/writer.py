"""Write a checkpoint again with some tensors replaced: untouched bytes are copied by the kernel, one site is in memory."""

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
"""Threads that copy: while one waits for the disk to read, others let it write."""
PIECE = 2**28
"""Bytes that one of them takes at a time."""


def _unheard(num_bytes: int) -> None:
    del num_bytes


def output_bytes(
    source: Checkpoint, shapes: Mapping[str, tuple[int, ...]], instead: Mapping[str, Sequence[str]] = NOTHING
) -> int:
    """Bytes of all shards that `rewrite` leaves, headers included: what its `progress` adds up to."""
    return sum(lay_out(source, name, shapes, instead).size for name in source.shards)


def rewrite(
    source: Checkpoint,
    target: Path,
    shapes: Mapping[str, tuple[int, ...]],
    owner: Mapping[str, str],
    produce: Callable[[str], Mapping[str, Tensor]],
    progress: Callable[[int], None] = _unheard,
    instead: Mapping[str, Sequence[str]] = NOTHING,
) -> None:
    """Write shards of the source's names and membership, and the index, into the existing directory `target`.

    `shapes` gives the tensors to replace and their new shapes (`instead` those that replace one of another name), `owner` the
    site that makes each, `produce` all tensors of a site in the source's dtype; sites are asked for in the order in which the
    shards need them, each at most once. Shards get their names when they are on the disk whole, so another call after a kill
    writes only the missing ones, and the same bytes. `progress` hears bytes newly in place, from two threads but never both at
    once.

    Raises:
        UserError: the disk cannot hold it, or may not be written to.
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
    """Who makes what."""

    owner: Mapping[str, str]
    produce: Callable[[str], Mapping[str, Tensor]]

    def needed_by(self, shard: Shard) -> list[str]:
        return list(dict.fromkeys(self.owner[name] for name in shard.tensors))


class _Stopped(Exception):
    """Unwinds the copying thread when the computing one has failed."""


def _write(
    source: Checkpoint, target: Path, shards: list[Shard], sites: _Sites, progress: Callable[[int], None]
) -> None:
    """This thread computes sites, a few copy the untouched runs, one waits for the disk and names what is whole."""
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
        closed = []
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
    """A full disk stops the computation too, not only the copying."""
    for future in futures:
        if future.done():
            future.result()


@contextmanager
def _create(target: Path, shard: Shard) -> Iterator[Target]:
    """The file at its full size, its header written."""
    file = Target(_partial(target, shard), shard.size)
    try:
        file.write(shard.header, 0)
        yield file
    finally:
        file.abandon()


def _pieces(shard: Shard, file: Target) -> Iterator[tuple[Run, ...]]:
    """The untouched runs as portions for the copying threads; all in one where the threads would share a file position."""
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
                raise UserError(f"{path}: cut while it was copied: {error}; start again") from error


def _write_site(made: Mapping[str, Tensor], places: Mapping[str, Any], report: Callable[[int], None]) -> None:
    """Every tensor of a site to its place, in whichever shard that is; those of shards already whole are not needed."""
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
    """The source's index with names and sizes made true: bytes, and parameters where it counts them."""
    assert source.index is not None
    heirs = {name: instead.get(name, (name,)) for name in source.tensors}
    touched = [name for name in heirs if name in instead or name in shapes]
    fewer = {
        name: math.prod(source.tensors[name].shape) - sum(math.prod(shapes[heir]) for heir in heirs[name])
        for name in touched
    }
    metadata = dict(source.index.get("metadata") or {})
    saved = sum(count * source.tensors[name].dtype.itemsize for name, count in fewer.items())
    metadata["total_size"] = source.num_bytes - saved
    if "total_parameters" in metadata:
        metadata["total_parameters"] -= sum(fewer.values())
    weight_map = {
        heir: shard for name, shard in source.index["weight_map"].items() for heir in instead.get(name, (name,))
    }
    return {**source.index, "metadata": metadata, "weight_map": weight_map}
