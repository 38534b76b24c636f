"""Parquet: every row's `text` column (or another, `file.parquet:column`) a document."""

import random
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import UserError


def documents(path: Path, column: str = "text", seed: int | None = None) -> Iterator[str]:
    """The documents row by row, or with row groups and the rows inside each in an order drawn from `seed`.

    One row group's column is in memory at a time. Empty rows are passed over.

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


def _check_column(path: Path, schema: object, column: str) -> None:
    """Refuse a column that is absent or holds something else than strings; `schema` is pyarrow's."""
    names = schema.names
    if column not in names:
        listed = ", ".join(names)
        raise UserError(f"{path}: expected a column {column!r}, found {listed}; name one as FILE.parquet:COLUMN")
    if str(schema.field(column).type) not in ("string", "large_string", "string_view"):
        raise UserError(
            f"{path}: column {column!r} holds {schema.field(column).type}, expected text; name another column"
        )
