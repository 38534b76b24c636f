"""The header of a GGUF file: which tensors it holds and where, checked against the file's size before any other reader opens it.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): "GGUF", a version, the numbers of tensors and of fields, the
fields, the table of tensors, and the data from the next multiple of the alignment.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_TENSORS, _MOST_FIELDS, _MOST_ITEMS, _MOST_AXES, _LONGEST = 2**20, 2**16, 2**24, 8, 2**26
_AGAIN = "download or copy it again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its shape as torch has it, and the place of its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    """Number of its type in ggml."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The fields of a GGUF file that are no arrays, and its tensors in the order of the table."""

    fields: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


class _Cursor:
    """A place in the file; whatever would be read beyond its end is refused."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        self.require(size)
        found = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return found

    def skip(self, size: int) -> None:
        self.require(size)
        self.at += size

    def text(self) -> str:
        size = self.number("Q")
        if size > _LONGEST:
            raise self.wrong(f"a text of {size} bytes")
        self.require(size)
        found = self.data[self.at : self.at + size]
        self.at += size
        return found.decode("utf-8", "replace")

    def value(self) -> Any:
        """Return a number or text; None for an array, which is passed over."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self.wrong(f"a field of type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if count > _MOST_ITEMS or kind not in (_STRING, *_NUMBERS):
            raise self.wrong(f"an array of {count} items of type {kind}")
        if kind != _STRING:
            self.skip(struct.calcsize(f"<{_NUMBERS[kind]}") * count)
            return None
        for _ in range(count):
            self.skip(self.number("Q"))
        return None

    def require(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise UserError(
                f"{self.path}: truncated: expected {self.at + size} bytes for its header, got {len(self.data)}; {_AGAIN}"
            )

    def wrong(self, found: str) -> UserError:
        return UserError(f"{self.path}: expected a GGUF header, got {found} at byte {self.at}; {_AGAIN}")


def read_gguf_header(path: Path, blocks: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Return the header of a GGUF file; `blocks` gives the elements and bytes of a block by type of ggml.

    Raises:
        UserError: another file, one that is cut, tensors of an unknown type, or one part of a model in several files.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise UserError(f"{path}: expected a GGUF file, got one that does not begin with GGUF; {_AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data, path), blocks)


def _read(cursor: _Cursor, blocks: Mapping[int, tuple[int, int]]) -> GgufHeader:
    cursor.skip(4)
    version, num_tensors, num_fields = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise cursor.wrong(f"version {version}, where 2 and 3 are read,")
    if num_tensors > _MOST_TENSORS or num_fields > _MOST_FIELDS:
        raise cursor.wrong(f"{num_tensors} tensors and {num_fields} fields")
    fields = {}
    for _ in range(num_fields):
        name = cursor.text()
        fields[name] = cursor.value()
    if (fields.get("split.count") or 1) != 1:
        raise UserError(
            f"{cursor.path}: expected a whole model, got part of one in {fields['split.count']} files; join them first with llama.cpp's "
            "llama-gguf-split --merge"
        )
    table = [_entry(cursor, blocks) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise cursor.wrong(f"an alignment of {alignment!r:.40}")
    base = -(-cursor.at // alignment) * alignment
    size = len(cursor.data)
    placed = tuple(GgufTensor(t.name, t.shape, t.kind, base + t.start, base + t.end) for t in table)
    if (needed := max((tensor.end for tensor in placed), default=0)) > size:
        raise UserError(f"{cursor.path}: truncated: expected {needed} bytes by its header, got {size}; {_AGAIN}")
    return GgufHeader(fields, placed)


def _entry(cursor: _Cursor, blocks: Mapping[int, tuple[int, int]]) -> GgufTensor:
    name, num_axes = cursor.text(), cursor.number("I")
    if num_axes > _MOST_AXES:
        raise cursor.wrong(f"a tensor of {num_axes} axes")
    shape = tuple(reversed(cursor.numbers("Q", num_axes)))
    kind, start = cursor.number("I"), cursor.number("Q")
    if kind not in blocks:
        raise UserError(f"{cursor.path}: {name}: expected a type that the gguf package knows, got {kind}; update gguf")
    elements, size = blocks[kind]
    count = math.prod(shape)
    if shape and shape[-1] % elements:
        raise cursor.wrong(f"{name} with rows of {shape[-1]} where blocks have {elements}")
    return GgufTensor(name, shape, kind, start, start + count // elements * size)
