"""Floor 4: data for calibration and evaluation. One page per source or kind of data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError, suggest
from . import hub, jsonl, parquet, stdlib, text
from .bounds import check_source
from .rows import Table

SOURCES = "a text file or folder, FILE.jsonl[:COLUMN], FILE.parquet[:COLUMN], hub:NAME[:CONFIG][:SPLIT][:COLUMN], stdlib or self"
"""The sources of text that a user may name, for help texts and messages."""

_COLUMNED = {".jsonl": jsonl.documents, ".parquet": parquet.documents}


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of one source. The plan records `name`; `documents` can be iterated once."""

    name: str
    documents: Iterator[str]


def open_corpus(source: str | Table, *, seed: int | None = None, columns: Sequence[str] = ()) -> Corpus:
    """Return the documents of a source, in their own order or, with a seed, in an order drawn from it. Documents are read on
    demand. `columns` names the column of rows that were given.

    `self` is not a corpus: its text is sampled from a model (`corpus.self.sample_windows`).

    Raises:
        UserError: there is no such source; the possible ones are listed.
    """
    if isinstance(source, Table):
        return Corpus(source.name, source.documents(columns, seed))
    check_source(source)
    if source == "stdlib":
        return Corpus("stdlib", stdlib.documents(seed))
    if source.startswith("hub:"):
        return Corpus(source, hub.documents(source.removeprefix("hub:"), seed))
    path, column = _split_column(source)
    if not path.exists():
        return _from_hub(source, seed)
    if path.suffix in _COLUMNED and path.is_file():
        return Corpus(source, _COLUMNED[path.suffix](path, column or "text", seed))
    return Corpus(source, text.documents(path, seed))


def _split_column(source: str) -> tuple[Path, str]:
    """Split `FILE.jsonl:COLUMN` into file and column; every other source is a path without a column."""
    head, colon, column = source.rpartition(":")
    if colon and Path(head).suffix in _COLUMNED and not Path(source).exists():
        return Path(head), column
    return Path(source), ""


def _from_hub(source: str, seed: int | None) -> Corpus:
    """Return the hub dataset `org/name`, if the source is not a path and has no file suffix; anything else is an error."""
    name = source.partition(":")[0]
    is_file_name = Path(name).suffix in (*_COLUMNED, *text.SUFFIXES, ".json", ".csv", ".gz")
    if name.count("/") == 1 and not is_file_name and not name.startswith((".", "/", "~")):
        return Corpus(f"hub:{source}", hub.documents(source, seed))
    near = suggest(source, ["stdlib", "self"])
    hint = f"; {near}" if near.startswith("did you mean") else ""
    raise UserError(f"text source {source!r}: no such file or source{hint}; expected {SOURCES}")
