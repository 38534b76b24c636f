"""Plain text, one item a line: one file, or parallel files whose n-th lines belong together; `.gz` is unpacked."""

import gzip
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ..core.errors import UserError
from .rows import Row, Table


def parallel_lines(paths: Sequence[Path], columns: Sequence[str]) -> Table:
    """Text files, plain or `.gz`, whose n-th lines belong together, one column a file; rows with a blank line are left out.

    Raises:
        UserError: a file that is not there, not UTF-8, or has another number of lines.
    """
    name = ",".join(map(str, paths))
    filled = [number for number, lines in enumerate(_zipped(paths, name)) if all(line.strip() for line in lines)]

    def take(numbers: Sequence[int], asked: Sequence[str]) -> Iterator[Row]:
        del asked
        wanted = iter([filled[number] for number in numbers])
        following = next(wanted, None)
        for number, lines in enumerate(_zipped(paths, name)):
            if following is None:
                return
            if number == following:
                yield dict(zip(columns, (line.strip() for line in lines), strict=True))
                following = next(wanted, None)

    return Table(name, tuple(columns), len(filled), take)


def _zipped(paths: Sequence[Path], name: str) -> Iterator[tuple[str, ...]]:
    for lines in itertools.zip_longest(*map(_lines, paths)):
        if None in lines:
            raise UserError(f"{name}: expected files of as many lines each, got one that ends first; align them")
        yield lines


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open_text(path) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got bytes that are not ({error.reason}); convert it") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: expected a whole gzip file ({error}); fetch it again") from error


def _open_text(path: Path) -> IO[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected text, one item a line")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
