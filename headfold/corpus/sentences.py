"""Sentences for encoders: one per line of text, per row of a column, or per document."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import UserError
from . import _split_column, open_corpus
from .fasta import is_fasta, sequences
from .lines import parallel_lines
from .pairs import padded
from .rows import Stream, Table, concatenated, is_table, open_rows, require, text_of, value
from .text import text_files


def read_sentences(
    source: str | Table, columns: Sequence[str] = (), num_items: int | None = None, seed: int | None = None
) -> tuple[list[str], list[Any] | None]:
    """Return sentences, and their labels if a second column is named: the first ones of the source, or drawn by seed from all of
    it.

    A text file, plain or `.gz`, gives its lines, a folder those of all its text files, a FASTA file its sequences; tables give column
    `text`, `columns[0]`, or the one in `FILE.jsonl:COLUMN`; `stdlib` gives its files. Blank ones are skipped.

    Raises:
        UserError: an unreadable or empty source, or a missing column.
    """
    if source == "self":
        raise UserError(
            "self: expected sentences, but an encoder cannot generate text; give a text file with one sentence per line"
        )
    if source == "stdlib":
        texts = filter(str.strip, open_corpus(source, seed=seed).documents)
        return list(itertools.islice(texts, num_items)), None
    rows, names = _open(source, columns)
    drawn = list(rows.draw(names, num_items, seed, lambda row: bool(text_of(row, names[0], rows.name).strip())))
    if not drawn:
        raise UserError(f"{source}: expected sentences, found none; give another source")
    labels = [value(row, names[1]) for row in drawn] if len(names) > 1 else None
    return [value(row, names[0]) for row in drawn], labels


def _open(source: str | Table, columns: Sequence[str]) -> tuple[Table | Stream, tuple[str, ...]]:
    if isinstance(source, Table):
        return source, require(source, tuple(columns) or ("text",))
    path, column = _split_column(source)
    names = tuple(columns) or (column or "text",)
    if is_table(str(path) if column else source):
        rows = open_rows(str(path) if column else source)
        return rows, require(rows, names)
    if len(names) > 1:
        raise UserError(f"{source}: plain text has no columns {', '.join(names)}; give FILE.jsonl or FILE.parquet")
    if path.is_file() and is_fasta(path):
        rows = sequences(path)
        return rows, require(rows, names)
    if path.exists():
        return _lines_of_all(path), names
    return _hub(source), names


def _lines_of_all(path: Path) -> Table:
    """Return the lines of a text file, or of all text files of a folder, as one table."""
    files = text_files(path)
    return concatenated(str(path), [parallel_lines([file], ["text"]) for file in files])


def _hub(source: str) -> Stream:
    """Return the hub dataset `org/name`; anything else is an error."""
    stream = open_rows(open_corpus(source).name)
    assert isinstance(stream, Stream)
    return stream


def encode_sentences(
    texts: Sequence[str], tokenizer: Any, context: int, *, filled: bool = False
) -> dict[str, Int[Tensor, "sentence token"]]:
    """Return `input_ids`, `attention_mask` and, if the tokenizer makes them, `token_type_ids`, truncated to `context` tokens.

    With `filled`, all texts are filled up to `context` tokens, and the padding counts as text.
    """
    if filled:
        ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=context, verbose=False)[
            "input_ids"
        ]
        tokens = padded(ids, 0)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    encoded = tokenizer(list(texts), truncation=True, max_length=context, verbose=False)
    padding = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
    return {name: padded(encoded[name], fill) for name, fill in padding.items() if name in encoded}


def unknown_share(tokens: Int[Tensor, "sentence token"], tokenizer: Any) -> float:
    """Return how many of the tokens that are no special ones the tokenizer does not know; 0 where it knows every text."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = [number for number in getattr(tokenizer, "all_special_ids", ()) if number != unknown]
    counted = ~torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype))
    if unknown is None or not counted.any():
        return 0.0
    return ((tokens == unknown) & counted).sum().item() / counted.sum().item()


def batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield `size` consecutive texts at a time."""
    return (texts[at : at + size] for at in range(0, len(texts), size))
