"""The new layout of a shard, computed before any of its data: header, size, the place of every tensor, and what is copied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from .headers import Header, TensorInfo, encode_header, num_bytes
from .reader import Checkpoint
from .target import PAGE

NOTHING: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Run:
    """`count` contiguous bytes to copy, from offset `start` in the source to offset `place` in the target."""

    start: int
    place: int
    count: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write. `tensors` are the replaced ones with their absolute offsets in it, in the order of the file."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]
    runs: tuple[Run, ...]

    def is_written(self, target: Path) -> bool:
        """Return whether this file is complete in `target`; files get their final names only when they are."""
        path = target / self.name
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def lay_out(
    source: Checkpoint,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    instead: Mapping[str, Sequence[str]] = NOTHING,
) -> Shard:
    """Return the layout of shard `name` of the source with the tensors in `shapes` resized, in the source's order.

    `instead` maps tensors that are removed to those, in `shapes`, that replace them in their place and dtype.
    """
    old = source.in_shard(name)
    new: dict[str, TensorInfo] = {}
    position = 0
    for tensor, info in sorted(old.items(), key=lambda item: (item[1].start, item[1].end)):
        for new_name in instead.get(tensor, (tensor,)):
            shape = shapes.get(new_name, info.shape)
            end = position + num_bytes(info.dtype, shape)
            new[new_name] = TensorInfo(info.dtype, shape, name, position, end)
            position = end
    # On the same byte of a page as in the source, so that untouched data can be shared or moved as whole pages.
    begin = min((info.start for info in old.values()), default=0)
    header = encode_header(
        Header(
            {new_name: new[new_name] for tensor in old for new_name in instead.get(tensor, (tensor,))},
            source.metadata[name],
        ),
        begin,
        PAGE,
    )
    placed = {
        tensor: TensorInfo(info.dtype, info.shape, name, len(header) + info.start, len(header) + info.end)
        for tensor, info in new.items()
    }
    replaced = {tensor: info for tensor, info in placed.items() if tensor in shapes}
    return Shard(name, header, len(header) + position, replaced, _runs(old, placed, replaced))


def _runs(
    old: Mapping[str, TensorInfo], placed: Mapping[str, TensorInfo], replaced: Mapping[str, TensorInfo]
) -> tuple[Run, ...]:
    """Return the untouched bytes with neighbours joined; `placed` is in the order of the data."""
    runs: list[Run] = []
    for name, info in placed.items():
        count = info.end - info.start
        if name in replaced or count == 0:
            continue
        last = runs[-1] if runs else None
        if last and last.start + last.count == old[name].start and last.place + last.count == info.start:
            runs[-1] = Run(last.start, last.place, last.count + count)
        else:
            runs.append(Run(old[name].start, info.start, count))
    return tuple(runs)
