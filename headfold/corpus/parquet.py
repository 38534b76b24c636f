"""Parquet: the column `text` (or another, `file.parquet:column`) of every row is a document."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import UserError


def documents(path: Path, column: str = "text", seed: int | None = None) -> Iterator[str]:
    """Yield the documents row by row, or with row groups and the rows in each in an order drawn from `seed`.

    The column of one row group is in memory at a time. Empty rows are skipped.

    Raises:
        UserError: not a parquet file, no such column, or a column that is not text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'headfold[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: expected a parquet file ({str(error).splitlines()[0]})") from error
    with file:
        _check_column(path, file.schema_arrow, column)
        generator, row_groups = random.Random(seed), list(range(file.num_row_groups))
        if seed is not None:
            generator.shuffle(row_groups)
        for row_group in row_groups:
            texts = file.read_row_group(row_group, columns=[column]).column(column).to_pylist()
            if seed is not None:
                generator.shuffle(texts)
            yield from filter(None, texts)


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
