"""Bounds on what one item of a user's data may take: a small file can describe a text, an image or a table larger than any memory."""

import gzip
import io
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import UserError
from ..core.files import kind_of_file

LONGEST_LINE = 2**26
"""Bytes of a line of text or of JSON."""
LARGEST_TEXT = 2**32
"""Bytes of a plain text, which is read whole."""
MOST_ROWS = 2**28
"""Lines of parallel texts, or rows of a table."""
SHUFFLED_ROWS = 2**24
"""Rows up to which their order is shuffled as a whole; numbers of longer tables are drawn one at a time."""
DECOMPRESSED = 200, 2**24
"""A compressed text may be so many times as long as its file, and so many bytes more. Text is rarely compressed to a tenth; gzip can
write 1,000 equal bytes in one."""

FROM_PYTHON = "python:"
"""Begins the name of data that a Python program hands over, in files and on cards."""


def check_source(source: str) -> None:
    """Refuse a source of data that has no name, or whose name is that of a FIFO, a device, a socket, or data that only a program had.

    Raises:
        UserError: as said.
    """
    if not source.strip():
        raise UserError(
            "data: expected the name of a source, got an empty one; give a file, a folder or another source"
        )
    if source.startswith(FROM_PYTHON):
        raise UserError(
            f"{source}: data of a Python program, which are not kept with statistics or a plan; pass the same again as calibration, "
            "or write them to a file"
        )
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError):  # no path at all, or one that is refused where it is opened
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(
            f"{source}: expected a file or a folder, got {kind_of_file(mode)}; write the data to a file first"
        )


class BoundedLines(io.RawIOBase):
    """A file as it is read, or decompressed, whose lines and whose length are checked on the way.

    Iterating over `io.BufferedReader(BoundedLines(…))` yields lines as fast as over the file itself.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """`file` is the open file at `path`; one that ends in `.gz` is decompressed."""
        super().__init__()
        self._file, self._path = file, path
        self._content = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        self._length = self._line = 0

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Any) -> int:
        """Read the next part.

        Raises:
            UserError: a line is longer than `LONGEST_LINE`, or the text far longer than a compressed file can honestly hold.
        """
        part = self._content.read(len(memory))
        memory[: len(part)] = part
        last = max(part.rfind(b"\n"), part.rfind(b"\r"))
        self._line = self._line + len(part) if last < 0 else len(part) - last - 1
        self._length += len(part)
        if self._line > LONGEST_LINE:
            raise UserError(
                f"{self._path}: expected lines of at most {LONGEST_LINE} bytes, got a longer one; break it into several"
            )
        many, more = DECOMPRESSED
        if self._length > many * self._file.tell() + more:
            raise UserError(
                f"{self._path}: expected compressed text, got more than {many} times as much as the file holds; decompress it yourself"
            )
        return len(part)


def check_rows(count: int, path: Path) -> None:
    """Refuse a table that is longer than `MOST_ROWS`.

    Raises:
        UserError: as said.
    """
    if not 0 <= count <= MOST_ROWS:
        raise UserError(f"{path}: expected at most {MOST_ROWS} rows, got {count}; divide the file")


def drawn_order(count: int, seed: int) -> Iterator[int]:
    """Yield the numbers below `count` in an order drawn by the seed."""
    draws = random.Random(seed)
    if count <= SHUFFLED_ROWS:
        order = list(range(count))
        draws.shuffle(order)
        yield from order
        return
    seen: set[int] = set()
    while len(seen) < count:
        number = draws.randrange(count)
        if number not in seen:
            seen.add(number)
            yield number
