"""Sources with columns, read row by row: in their own order, or drawn by a seed from the whole source."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import regular_file
from . import hub, parquet
from .bounds import check_source, drawn_order
from .jsonl import line_starts, record

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".parquet")
TABLES = "FILE.jsonl, FILE.parquet, a folder of either, a folder that datasets saved, or hub:NAME[:CONFIG][:SPLIT]"
"""The sources with columns that a user may name."""


@dataclass(frozen=True, slots=True)
class Table:
    """Numbered rows. `take` reads the named columns of rows, given in ascending order."""

    name: str
    columns: tuple[str, ...]
    count: int
    take: Callable[[Sequence[int], Sequence[str]], Iterator[Row]]

    def __str__(self) -> str:
        return self.name

    def documents(self, columns: Sequence[str], seed: int | None) -> Iterator[str]:
        """Yield the text under the first of the columns (by default `text`), in order or, with a seed, in one drawn from it; rows are read
        one by one.

        Raises:
            UserError: a missing column, or one that holds something else.
        """
        name, *_ = require(self, tuple(columns) or ("text",))
        for number in range(self.count) if seed is None else drawn_order(self.count, seed):
            yield text_of(next(iter(self.take([number], [name]))), name, self.name)

    def draw(
        self, columns: Sequence[str], num_items: int | None, seed: int | None, usable: Callable[[Row], bool]
    ) -> Iterator[Row]:
        """Yield the first `num_items` usable rows in their own order or, with a seed, in an order drawn over the whole table.

        A drawn sample is held in memory. A larger sample with the same seed begins with the smaller one.
        """
        if seed is None:
            yield from itertools.islice(filter(usable, self.take(range(self.count), columns)), num_items)
            return
        order, missing = drawn_order(self.count, seed), self.count if num_items is None else num_items
        while chosen := list(itertools.islice(order, missing)):
            ascending = sorted(chosen)
            taken = dict(zip(ascending, self.take(ascending, columns), strict=True))
            for row in filter(usable, map(taken.__getitem__, chosen)):
                missing -= 1
                yield row


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows of a hub dataset, which cannot be accessed by number; `begin()` starts at the front, `begin(seed)` in shuffled order."""

    name: str
    columns: tuple[str, ...]
    begin: Callable[[int | None], Iterator[Row]]

    def draw(
        self, columns: Sequence[str], num_items: int | None, seed: int | None, usable: Callable[[Row], bool]
    ) -> Iterator[Row]:
        """Yield rows as `Table.draw` does, but a seed shuffles the shards and, `hub.SHUFFLE_BUFFER` at a time, the rows."""
        del columns
        yield from itertools.islice(filter(usable, self.begin(seed)), num_items)


def value(row: Row, column: str) -> Any:
    """Return the value under a column, or under a path of nested ones (`translation.en`); None if there is none."""
    if column in row:
        return row[column]
    head, _, rest = column.partition(".")
    inner = row.get(head)
    return value(inner, rest) if rest and isinstance(inner, Mapping) else None


def text_of(row: Row, column: str, where: str) -> str:
    """Return the text under a column, empty if it is null.

    Raises:
        UserError: it is not text.
    """
    found = value(row, column)
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"{where}: column {column!r} holds {type(found).__name__}, expected text; name another by --columns"
        )
    return found or ""


def file_of(path: str, folder: Path, where: str) -> Path:
    """Return the file that a row names, as it is or relative to the folder of its table.

    Raises:
        UserError: there is no such file, or it is not a regular one.
    """
    try:
        return regular_file(Path(path) if Path(path).exists() else folder / path, "the file that a row names")
    except (UserError, ValueError) as error:  # ValueError: a null character
        raise UserError(f"{where}: {error}") from error


def require(rows: Table | Stream, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns, after checking that the rows have all of them.

    Raises:
        UserError: one is missing; the existing ones are listed.
    """
    for column in columns:
        if column not in rows.columns and column.partition(".")[0] not in rows.columns:
            wanted, found = ", ".join(columns), ", ".join(rows.columns)
            raise UserError(f"{rows.name}: expected columns {wanted}, found {found}; name them with --columns")
    return tuple(columns)


def is_table(source: str | Table) -> bool:
    """Return whether `open_rows` reads the source: by its name, or because a folder contains tables.

    Raises:
        UserError: it has no name, or is neither a file nor a folder.
    """
    if isinstance(source, Table):
        return True
    check_source(source)
    path = Path(source)
    return source.startswith("hub:") or path.suffix in SUFFIXES or bool(path.is_dir() and _shards(path))


def open_rows(source: str | Table) -> Table | Stream:
    """Return the rows of a source, or those that were given; only what is needed to count them is read.

    Raises:
        UserError: there is nothing there, it is empty, or it is not a table.
    """
    if isinstance(source, Table):
        return source
    if source.startswith("hub:"):
        return _streamed(source)
    check_source(source)
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder; expected {TABLES}")
    if path.is_dir():
        rows = _folder(path)
    elif path.suffix in SUFFIXES:
        rows = _file(path)
    else:
        raise UserError(f"{source}: expected rows with columns, got a {path.suffix or 'nameless'} file; give {TABLES}")
    if rows.count == 0:
        raise UserError(f"{source}: expected rows, found none; give another source")
    return rows


def _folder(path: Path) -> Table:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path)
    shards = _shards(path)
    if not shards:
        raise UserError(f"{path}: expected .jsonl or .parquet files, found none in this folder; give {TABLES}")
    return concatenated(str(path), [_file(shard) for shard in shards])


def _shards(path: Path) -> list[Path]:
    saved = [name for name in ("state.json", "dataset_dict.json") if (path / name).is_file()]
    return [path / name for name in saved] or sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)


def _file(path: Path) -> Table:
    return _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)


def _jsonl(path: Path) -> Table:
    starts = line_starts(path)

    def take(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        del columns
        with path.open("rb") as file:
            for number in numbers:
                file.seek(starts[number])
                yield record(file.readline(), f"{path}: line at byte {starts[number]}")

    columns = tuple(next(take([0], ()))) if starts else ()
    return Table(str(path), columns, len(starts), take)


def _parquet(path: Path) -> Table:
    with parquet.opened(path) as file:
        names, ends = tuple(file.schema_arrow.names), list(itertools.accumulate(parquet.row_counts(file, path)))

    def take(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        heads = list(dict.fromkeys(column.partition(".")[0] for column in columns))
        with parquet.opened(path) as file:
            for index, here in _by_part(numbers, ends):
                yield from parquet.rows(file, index, heads, here, path)

    return Table(str(path), names, ends[-1] if ends else 0, take)


def _by_part(numbers: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield ascending numbers by the part they fall into, given where each part ends: (part, numbers within it)."""
    at = 0
    for part, end in enumerate(ends):
        begin, here = ends[part - 1] if part else 0, []
        while at < len(numbers) and numbers[at] < end:
            here.append(numbers[at] - begin)
            at += 1
        if here:
            yield part, here


def concatenated(name: str, tables: Sequence[Table]) -> Table:
    """Return several tables with the same columns as one."""
    ends = list(itertools.accumulate(table.count for table in tables))

    def take(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        for part, here in _by_part(numbers, ends):
            yield from tables[part].take(here, columns)

    shared = [column for column in tables[0].columns if all(column in table.columns for table in tables)]
    return Table(name, tuple(shared), ends[-1], take)


def _saved(path: Path) -> Table:
    """Return the table that `datasets` wrote by `save_to_disk`. Images and audio stay encoded."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading this folder needs the datasets library; pip install 'headfold[data]'"
        ) from error
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # of arrow, of json, and its own
        raise UserError(
            f"{path}: datasets does not read this folder ({hub.first_line(error)}); save it again"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        raise UserError(f"{path}: a folder of splits; name one of {', '.join(str(path / split) for split in data)}")
    data = encoded(data)

    def take(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        del columns
        return (data[number] for number in numbers)

    return Table(str(path), tuple(data.column_names), len(data), take)


def encoded(data: Any) -> Any:
    """Return a dataset of `datasets` that returns images and audio as bytes and path, not decoded."""
    import datasets

    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            data = data.cast_column(name, type(feature)(decode=False))
    return data


def _streamed(source: str) -> Stream:
    name, config, split = (source.removeprefix("hub:").split(":") + [""] * 2)[:3]
    stream = encoded(hub.open_stream(name, config or None, split or "train"))

    def begin(seed: int | None) -> Iterator[Row]:
        chosen = stream if seed is None else stream.shuffle(seed=seed, buffer_size=hub.SHUFFLE_BUFFER)
        rows = iter(chosen)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the network may go away at any row
                raise UserError(f"{source}: reading stopped: {hub.first_line(error)}; try again") from error
            yield row

    first = next(begin(None), None)
    if first is None:
        raise UserError(f"{source}: expected rows, found none; give another split")
    return Stream(source, tuple(first), begin)
