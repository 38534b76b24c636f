"""Safetensors headers: which tensors a shard contains and where, read and written without the data.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header padded with spaces,
then the tensors without gaps. `data_offsets` count from the end of the header.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import UserError
from ..core.json_input import parse_object
from .disk import sizes

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
PACKED_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}  # fmt: skip
"""Dtypes that only quantised checkpoints have."""

_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer header."""
_PREFIX = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor: absolute byte offsets in the file `shard`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one shard: its tensors in the order of the header, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] | None


def read_header(path: Path, *, packed: bool = False) -> Header:
    """Return the header of a shard, checked against the file's size; if `packed`, it may be that of quantised weights.

    Raises:
        UserError: a truncated file, a corrupt header, or a dtype that only quantised checkpoints have, unless `packed`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        length = _PREFIX.unpack(prefix)[0] if len(prefix) == _PREFIX.size else 0
        if not 2 <= length <= _LONGEST_HEADER:
            raise _corrupt(path, f"its first eight bytes give a header of {length} bytes in a file of {size} bytes")
        if _PREFIX.size + length > size:
            raise _truncated(path, _PREFIX.size + length, size, "for the header alone")
        text = file.read(length)
    entries = parse_object(text, f"{path}: corrupt safetensors header")
    metadata = entries.pop("__metadata__", None)
    known = DTYPES | PACKED_DTYPES if packed else DTYPES
    tensors = {name: _entry(path, name, entry, _PREFIX.size + length, known) for name, entry in entries.items()}
    _check_layout(path, tensors.values(), _PREFIX.size + length, size)
    _check_by_library(path)
    return Header(tensors, metadata)


def encode_header(header: Header, like: int = 0, page: int = 8) -> bytes:
    """Return the bytes before the data; the offsets in `header` count from the beginning of the data.

    It is padded so that the data begins at the same offset within a page as byte `like`.
    """
    entries: dict[str, Any] = {} if header.metadata is None else {"__metadata__": header.metadata}
    for name, info in header.tensors.items():
        entries[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [info.start, info.end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((like - _PREFIX.size - len(text)) % page)
    return _PREFIX.pack(len(text)) + text


def num_bytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor on disk."""
    return dtype.itemsize * math.prod(shape)


def _entry(path: Path, name: str, entry: Any, base: int, known: Mapping[str, torch.dtype]) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _corrupt(path, f"{name} lacks its dtype, shape or data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _corrupt(path, f"{name} has a dtype, shape or data_offsets of another type than the format's")
    start, end = offsets
    if code not in known:
        raise UserError(
            f"{path}: {name} has dtype {code:.20}; expected unquantised weights (BF16, F16, F32 or F64); "
            "start from the checkpoint before quantisation"
        )
    if end - start != num_bytes(known[code], shape):
        raise _corrupt(
            path,
            f"{name}, {code} of shape {shape}, has {end - start} bytes, expected {num_bytes(known[code], shape)}",
        )
    return TensorInfo(known[code], tuple(shape), path.name, base + start, base + end)


def _are_sizes(value: Any) -> bool:
    """Return whether a value is a list of whole numbers that are not negative; true and 2.0 are none."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_by_library(path: Path) -> None:
    """Check that safetensors itself opens the file, so that nothing is written that only this reader takes; no data are read."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise _corrupt(path, f"safetensors refuses it ({error})") from error


def _check_layout(path: Path, tensors: Iterable[TensorInfo], base: int, size: int) -> None:
    """Check that the tensors follow one another from the header to the end of the file."""
    position = base
    for info in sorted(tensors, key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise _corrupt(path, f"its tensors leave a hole or overlap at byte {min(position, info.start)}")
        position = info.end
    if position > size:
        raise _truncated(path, position, size, "by its header")
    if position < size:
        raise _corrupt(path, f"the file has {size} bytes, expected {position}")


def _truncated(path: Path, expected: int, got: int, why: str) -> UserError:
    return UserError(
        f"{path}: truncated: expected {sizes(expected)} {why}, got {sizes(got)}; download or copy it again"
    )


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(f"{path}: corrupt safetensors header: {what}; download or copy it again")
