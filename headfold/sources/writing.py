"""Write the shards of a checkpoint from a stream of tensors whose shapes are not known before: one tensor is in memory at a time."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ..checkpoint.disk import disk_errors
from ..checkpoint.entries import WEIGHTS
from ..checkpoint.headers import Header, TensorInfo, encode_header
from ..checkpoint.staging import write_json
from ..checkpoint.transfer import raw_bytes
from ..core.errors import UserError

SHARD_BYTES = 5 * 10**9
"""Bytes of data from which a new shard begins, as transformers writes them."""
_PAGE = 4096
_PER_TENSOR = 192
"""Bytes that the entry of a tensor takes in a header beside its name, at most."""


class _Shard:
    """A file whose header is written last, into room that is left for it: safetensors allows spaces after it."""

    def __init__(self, path: Path, room: int) -> None:
        self.path, self.room, self.size, self._taken = path, room, 0, _PAGE // 2
        self.tensors: dict[str, TensorInfo] = {}
        self._file: BinaryIO = path.open("wb")
        self._file.seek(room)

    def holds(self, name: str) -> bool:
        """Return whether the header has room for one more tensor, and the file for its data."""
        return self.size < SHARD_BYTES and self._taken + _entry_bytes(name) <= self.room

    def add(self, name: str, tensor: Tensor) -> None:
        count = tensor.numel() * tensor.element_size()
        self.tensors[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), self.path.name, self.size, self.size + count)
        self._file.write(raw_bytes(tensor))
        self.size += count
        self._taken += _entry_bytes(name)

    def finish(self) -> None:
        header = encode_header(Header(self.tensors, {"format": "pt"}), self.room, self.room)
        assert len(header) == self.room
        self._file.seek(0)
        self._file.write(header)
        self.close()

    def close(self) -> None:
        self._file.close()


def write_shards(
    directory: Path, names: Iterable[str], tensors: Iterable[tuple[str, Tensor]], progress: Callable[[int], None]
) -> int:
    """Write the weights of a checkpoint into an existing directory, with an index where there are several shards; return their bytes.

    `names` are those that the tensors are expected to have; more are taken, too. `progress` is called with the bytes of each.

    Raises:
        UserError: a name comes twice, or the place is full or cannot be written to.
    """
    room = _room(names)
    shards: list[_Shard] = []
    seen: set[str] = set()
    with disk_errors(directory):
        try:
            for name, tensor in tensors:
                if name in seen:
                    raise UserError(f"{directory}: expected each tensor once, got {name} twice; repair the source")
                seen.add(name)
                if not shards or not shards[-1].holds(name):
                    shards.append(_Shard(directory / f"shard-{len(shards)}", max(room, _room([name]))))
                kept = tensor.detach().cpu().contiguous()
                shards[-1].add(name, kept)
                progress(kept.numel() * kept.element_size())
            for shard in shards:
                shard.finish()
        finally:
            for shard in shards:
                shard.close()
        _name(directory, shards)
    return sum(shard.size for shard in shards)


def _room(names: Iterable[str]) -> int:
    """Return the bytes of a header with these tensors: whole pages, so that the data begins on one."""
    needed = sum(map(_entry_bytes, names)) + _PAGE
    return -(-needed // _PAGE) * _PAGE


def _entry_bytes(name: str) -> int:
    return len(name.encode()) + _PER_TENSOR


def _name(directory: Path, shards: list[_Shard]) -> None:
    """Give the files their names, now that their number is known."""
    single, index = WEIGHTS
    if len(shards) == 1:
        shards[0].path.rename(directory / single)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(directory / name)
        weight_map |= dict.fromkeys(shard.tensors, name)
    write_json(directory / index, {"metadata": {"total_size": sum(s.size for s in shards)}, "weight_map": weight_map})
