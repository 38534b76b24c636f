"""Where calibration and evaluation text comes from: one page per source."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError, suggest
from . import hub, jsonl, parquet, stdlib, text

SOURCES = "a text file or folder, FILE.jsonl[:COLUMN], FILE.parquet[:COLUMN], hub:NAME[:CONFIG][:SPLIT][:COLUMN], stdlib or self"
"""What a user may write, for help texts and messages."""

_COLUMNED = {".jsonl": jsonl.documents, ".parquet": parquet.documents}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents from one source. `name` is what the plan records; `documents` can be walked once."""

    name: str
    documents: Iterator[str]


def open_corpus(source: str, *, seed: int | None = None) -> Corpus:
    """The documents of a source, in their own order or, given a seed, in one drawn from it. Nothing is read before the first.

    `self` is no corpus: its text is sampled from a model (`corpus.self.sample_windows`).

    Raises:
        UserError: nothing goes by that name; what could is said.
    """
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
    """`FILE.jsonl:COLUMN` → file and column; every other source is a path alone."""
    head, colon, column = source.rpartition(":")
    if colon and Path(head).suffix in _COLUMNED and not Path(source).exists():
        return Path(head), column
    return Path(source), ""


def _from_hub(source: str, seed: int | None) -> Corpus:
    """`org/name` that is no path and has no suffix of a file is a hub dataset; anything else is a slip."""
    name = source.partition(":")[0]
    is_file_name = Path(name).suffix in (*_COLUMNED, *text.SUFFIXES, ".json", ".csv", ".gz")
    if name.count("/") == 1 and not is_file_name and not name.startswith((".", "/", "~")):
        return Corpus(f"hub:{source}", hub.documents(source, seed))
    near = suggest(source, ["stdlib", "self"])
    hint = f"; {near}" if near.startswith("did you mean") else ""
    raise UserError(f"text source {source!r}: no such file or source{hint}; expected {SOURCES}")
