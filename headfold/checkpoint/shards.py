"""The new shape of a shard, known in full before any of its data: header, size, where every tensor goes, what is copied."""

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
    """Bytes that lie together in source and target: `count` of them, from `start` there to `place` here."""

    start: int
    place: int
    count: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write. `tensors` are the replaced ones with their absolute offsets here, in the order of the file."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]
    runs: tuple[Run, ...]

    def is_written(self, target: Path) -> bool:
        """Whether this very file is complete in `target`: files get their names only when they are."""
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
    """Shard `name` of the source with the tensors in `shapes` resized; order of header and data stay the source's.

    `instead` maps tensors that go to those, in `shapes`, that come in their place and dtype.
    """
    old = source.in_shard(name)
    new: dict[str, TensorInfo] = {}
    position = 0
    for tensor, info in sorted(old.items(), key=lambda item: (item[1].start, item[1].end)):
        for heir in instead.get(tensor, (tensor,)):
            shape = shapes.get(heir, info.shape)
            end = position + num_bytes(info.dtype, shape)
            new[heir] = TensorInfo(info.dtype, shape, name, position, end)
            position = end
    # On the same byte of a page as in the source, so that untouched data can be shared or moved as whole pages.
    begin = min((info.start for info in old.values()), default=0)
    header = encode_header(
        Header({heir: new[heir] for tensor in old for heir in instead.get(tensor, (tensor,))}, source.metadata[name]),
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
    """Untouched neighbours joined; `placed` is in the order of the data."""
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
