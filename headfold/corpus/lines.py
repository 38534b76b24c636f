"""Plain text with one item per line: one file, or parallel files whose n-th lines belong together; `.gz` is decompressed."""

import gzip
import itertools
import zlib
from array import array
from collections.abc import Iterator, Sequence
from io import BufferedReader, TextIOWrapper
from pathlib import Path

from ..core.errors import UserError
from ..core.files import regular_file
from .bounds import MOST_ROWS, BoundedLines, check_rows
from .rows import Row, Table


def parallel_lines(paths: Sequence[Path], columns: Sequence[str]) -> Table:
    """Return text files, plain or `.gz`, as one table with a column per file; rows with a blank line are left out.

    Raises:
        UserError: a file that does not exist, is not UTF-8, is compressed far beyond what text is, or has another number of lines, or too
            long or too many ones.
    """
    name = ",".join(map(str, paths))
    filled = array("Q")
    count = 0
    for together in itertools.islice(_zipped(paths, name), MOST_ROWS + 1):
        if all(line.strip() for line in together):
            filled.append(count)
        count += 1
    check_rows(count, paths[0])

    def take(numbers: Sequence[int], named: Sequence[str]) -> Iterator[Row]:
        del named
        wanted = iter([filled[number] for number in numbers])
        following = next(wanted, None)
        for number, together in enumerate(_zipped(paths, name)):
            if following is None:
                return
            if number == following:
                yield dict(zip(columns, (line.strip() for line in together), strict=True))
                following = next(wanted, None)

    return Table(name, tuple(columns), len(filled), take)


def _zipped(paths: Sequence[Path], name: str) -> Iterator[tuple[str, ...]]:
    for together in itertools.zip_longest(*map(lines_of, paths)):
        if None in together:
            raise UserError(
                f"{name}: expected files with the same number of lines, got one that is shorter; align them"
            )
        yield together


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, plain or `.gz`.

    Raises:
        UserError: as `parallel_lines` for one file.
    """
    try:
        with regular_file(path, "text with one item per line").open("rb") as file:
            yield from TextIOWrapper(BufferedReader(BoundedLines(file, path)), encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got bytes that are not ({error.reason}); convert it") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: expected a whole gzip file ({error}); download it again") from error
