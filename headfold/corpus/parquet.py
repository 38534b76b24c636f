"""Parquet, read in slices of a row group: the column `text` (or another, `file.parquet:column`) of every row is a document."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import regular_file
from .bounds import LARGEST_TEXT, check_rows

SLICE = 256
"""Rows that are decoded at once."""
SLICE_BYTES = 2**33
"""Bytes that they may have, if each is as large as all that the row group stores: parquet stores equal values once."""


def documents(path: Path, column: str = "text", seed: int | None = None) -> Iterator[str]:
    """Yield the documents row by row, or with row groups and the rows in each in an order drawn from `seed`.

    The column of one row group is in memory at a time. Empty rows are skipped.

    Raises:
        UserError: not a parquet file, no such column, a column that is not text, or a row group with too much text.
    """
    with opened(path) as file:
        _check_column(path, file.schema_arrow, column)
        generator, counts = random.Random(seed), row_counts(file, path)
        row_groups = list(range(len(counts)))
        if seed is not None:
            generator.shuffle(row_groups)
        for row_group in row_groups:
            found = (row[column] for row in rows(file, row_group, [column], range(counts[row_group]), path))
            texts = list(_bounded(found, path))
            if seed is not None:
                generator.shuffle(texts)
            yield from filter(None, texts)


def _bounded(texts: Iterator[str | None], path: Path) -> Iterator[str | None]:
    total = 0
    for text in texts:
        total += len(text or "")
        if total > LARGEST_TEXT:
            raise UserError(
                f"{path}: expected row groups of at most {LARGEST_TEXT} characters of text, got more; write smaller ones"
            )
        yield text


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file as pyarrow's `ParquetFile`.

    Raises:
        UserError: pyarrow is not installed, or finds that the file is broken, while it is opened or later in the body.
    """
    regular_file(path, "a parquet file")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'headfold[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: expected a parquet file ({reason}); write or download it again") from error


def row_counts(file: Any, path: Path) -> list[int]:
    """Return the number of rows of each row group.

    Raises:
        UserError: the file claims more rows than are read.
    """
    counts = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    for end in itertools.accumulate(counts):
        check_rows(end, path)
    return counts


def rows(
    file: Any, row_group: int, columns: Sequence[str], numbers: Sequence[int], path: Path
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a row group with these ascending numbers, decoding a slice at a time.

    Raises:
        UserError: the row group ends before them.
    """
    at, done = 0, 0
    for batch in file.iter_batches(_slice(file, row_group), row_groups=[row_group], columns=list(columns)):
        end = done
        while end < len(numbers) and numbers[end] < at + len(batch):
            end += 1
        here = [number - at for number in numbers[done:end]]
        yield from (batch if len(here) == len(batch) else batch.take(here)).to_pylist() if here else ()
        at, done = at + len(batch), end
        if done == len(numbers):
            return
    if done < len(numbers):
        raise UserError(
            f"{path}: row group {row_group} ends after {at} rows, expected {numbers[-1] + 1}; download it again"
        )


def _slice(file: Any, row_group: int) -> int:
    """Return how many rows to decode at once."""
    # The sizes of single columns are not asked for: where these are broken, pyarrow 26 ends the process.
    return max(1, min(SLICE, SLICE_BYTES // max(1, file.metadata.row_group(row_group).total_byte_size)))


def _check_column(path: Path, schema: Any, column: str) -> None:
    """Check that the column exists and contains strings; `schema` is pyarrow's."""
    names = schema.names
    if column not in names:
        listed = ", ".join(names)
        raise UserError(f"{path}: expected a column {column!r}, found {listed}; name one as FILE.parquet:COLUMN")
    if str(schema.field(column).type) not in ("string", "large_string", "string_view"):
        raise UserError(
            f"{path}: column {column!r} holds {schema.field(column).type}, expected text; name another column"
        )
