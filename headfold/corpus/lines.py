"""Plain text with one item per line: one file, or parallel files whose n-th lines belong together; `.gz` is decompressed."""

import gzip
import itertools
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path

from ..core.errors import UserError
from .rows import Row, Table


def parallel_lines(paths: Sequence[Path], columns: Sequence[str]) -> Table:
    """Return text files, plain or `.gz`, as one table with a column per file; rows with a blank line are left out.

    Raises:
        UserError: a file that does not exist, is not UTF-8, or has another number of lines.
    """
    name = ",".join(map(str, paths))
    filled = [number for number, lines in enumerate(_zipped(paths, name)) if all(line.strip() for line in lines)]

    def take(numbers: Sequence[int], named: Sequence[str]) -> Iterator[Row]:
        del named
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
            raise UserError(
                f"{name}: expected files with the same number of lines, got one that is shorter; align them"
            )
        yield lines


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open_text(path) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got bytes that are not ({error.reason}); convert it") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: expected a whole gzip file ({error}); download it again") from error


def _open_text(path: Path) -> TextIOWrapper:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected text with one item per line")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
