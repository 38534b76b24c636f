"""Open a checkpoint directory by reading its headers only, and read single tensors from it."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError, listed
from ..core.json_input import read_object
from .config import CONFIG, check_layers, read_config
from .entries import WEIGHTS
from .headers import Header, TensorInfo, read_header
from .hub import resolve
from .refusals import check_finite, refuse_packed, refuse_remote_code, refuse_source
from .transfer import raw_bytes, read_into

__all__ = ["INDEX", "Checkpoint", "TensorInfo", "check_finite", "refuse_remote_code", "resolve"]

SINGLE, INDEX = WEIGHTS

_EDGE = 4096
"""Bytes of each end of a tensor that enter the fingerprint: one page."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A directory with config.json and safetensors weights; the weights stay on disk.

    `tensors` lists all tensors, shard by shard in the order of the headers. `shards` are file names in order, `metadata` is that
    of each header, `index` the parsed index file of a sharded checkpoint.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    metadata: Mapping[str, dict[str, str] | None]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, path: Path, *, packed: bool = False) -> "Checkpoint":
        """Read config, index and headers, and refuse a checkpoint that cannot be folded; if `packed`, its weights may be quantised.

        Raises:
            UserError: not a directory; no or unreadable config.json; no safetensors; missing, truncated or corrupt shards; an
                index that does not match them; quantised weights, unless `packed`; an adapter without its model; more layers than
                tensors.
        """
        path = Path(path)
        refuse_source(path)
        config = read_config(path)
        index = None if (path / SINGLE).exists() else _read_index(path)
        shards = (SINGLE,) if index is None else tuple(sorted(set(index["weight_map"].values())))
        headers = {shard: read_header(path / shard, packed=packed) for shard in shards}
        _refuse_mismatch(path, headers, index)
        tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
        if not packed:
            refuse_packed(path, config, tensors)
        check_layers(config, len(tensors), str(path / CONFIG))
        return cls(path, config, tensors, shards, {shard: header.metadata for shard, header in headers.items()}, index)

    def read(self, name: str) -> Tensor:
        """Return a copy of the tensor in the dtype and shape on disk; nothing else of its shard is loaded.

        Raises:
            UserError: the shard has been truncated since it was opened.
        """
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        with (self.path / info.shard).open("rb", buffering=0) as file:
            got = read_into(file.fileno(), raw_bytes(tensor), info.start)
        if got < info.end - info.start:
            raise UserError(
                f"{self.path / info.shard}: {name}: expected {info.end - info.start} bytes, got {got}; copy it again"
            )
        return tensor

    @property
    def num_parameters(self) -> int:
        """Number of stored numbers; tensors that share one name are counted once."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.end - info.start for info in self.tensors.values())

    def in_shard(self, shard: str) -> dict[str, TensorInfo]:
        """Return the tensors of one shard in the order of its header."""
        return {name: info for name, info in self.tensors.items() if info.shard == shard}

    def fingerprint(self) -> str:
        """Return the SHA-256 of the config, the headers and both ends of every tensor, independent of the directory's name."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            with (self.path / shard).open("rb", buffering=0) as file:
                for name, info in self.in_shard(shard).items():
                    digest.update(f"\n{shard} {name} {info.dtype} {info.shape} {info.start}\n".encode())
                    for piece in _edges(file.fileno(), info):
                        digest.update(piece)
        return digest.hexdigest()


def _edges(descriptor: int, info: TensorInfo) -> Iterator[bytes]:
    yield os.pread(descriptor, min(_EDGE, info.end - info.start), info.start)
    yield os.pread(descriptor, min(_EDGE, info.end - info.start), max(info.start, info.end - _EDGE))


def _read_index(path: Path) -> dict[str, Any]:
    """Return the index of a sharded checkpoint, after checking that every shard it names is present beside it."""
    index = read_object(path / INDEX)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise UserError(
            f"{path / INDEX}: expected a weight_map from tensor names to shard files, got none; download it again"
        )
    facts = index.get("metadata")
    if not isinstance(facts, dict | None) or type((facts or {}).get("total_parameters", 0)) is not int:
        raise UserError(
            f"{path / INDEX}: expected metadata with whole numbers of bytes and parameters, got {facts!r:.60}; download it again"
        )
    outside = sorted(shard for shard in set(names.values()) if Path(shard).name != shard)
    if outside:
        raise UserError(f"{path / INDEX}: expected shards beside the index, got {outside[0]!r}; correct the index")
    _refuse_absent(path, "shards", [shard for shard in set(names.values()) if not os.path.isfile(path / shard)])
    return index


def _refuse_mismatch(path: Path, headers: Mapping[str, Header], index: dict[str, Any] | None) -> None:
    times = Counter(name for header in headers.values() for name in header.tensors)
    twice = sorted(name for name, count in times.items() if count > 1)
    if twice:
        raise UserError(
            f"{path}: tensor {twice[0]} is in more than one shard; expected each once; save the checkpoint again"
        )
    named = {} if index is None else index["weight_map"]
    _refuse_absent(path, "tensors", [name for name, shard in named.items() if name not in headers[shard].tensors])


def _refuse_absent(path: Path, what: str, absent: list[str]) -> None:
    if absent:
        raise UserError(
            f"{path / INDEX}: names {what} that are missing: {listed([f'{name:.100}' for name in sorted(absent)])}; download or copy the "
            "checkpoint again"
        )
