"""Pairs of texts for encoder-decoders: an input and its expected output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import UserError
from .lines import parallel_lines
from .rows import TABLES, Row, Stream, Table, is_table, open_rows, require, text_of, value

COLUMNS = ("source", "target")
PAIRS = f"SOURCE.txt,TARGET.txt (line by line, .gz allowed) or {TABLES}"
IGNORED = -100
"""The label that the losses of transformers ignore."""


def read_pairs(
    source: str | Table, columns: Sequence[str] = (), num_items: int | None = None, seed: int | None = None
) -> list[tuple[str, str]]:
    """Return pairs of (input, expected output): the first `num_items` of the source or, with a seed, as many drawn from all of
    it.

    `columns` names the two columns (default `source`, `target`). Rows with a blank side are skipped.

    Raises:
        UserError: an unreadable or empty source, a missing column, or one that contains no text.
    """
    names = tuple(columns) or COLUMNS
    if len(names) != 2:
        raise UserError(f"{source}: pairs need two columns, got {', '.join(names)}; give --columns INPUT,OUTPUT")
    rows = _open(source, names)
    names = require(rows, names)

    def usable(row: Row) -> bool:
        return all(text_of(row, name, rows.name).strip() for name in names)

    pairs = [(value(row, names[0]), value(row, names[1])) for row in rows.draw(names, num_items, seed, usable)]
    if not pairs:
        raise UserError(f"{source}: expected pairs of text, found none; give another source")
    return pairs


def _open(source: str | Table, columns: Sequence[str]) -> Table | Stream:
    if isinstance(source, Table):
        return source
    first, comma, second = source.partition(",")
    if comma and not Path(source).exists():
        return parallel_lines([Path(first), Path(second)], columns)
    if not is_table(source) and Path(source).is_file():
        raise UserError(f"{source}: an encoder-decoder needs pairs of text, got one file of text; give {PAIRS}")
    return open_rows(source)


def with_languages(tokenizer: Any, columns: Sequence[str]) -> Any:
    """Return a tokenizer of several languages after setting those of inputs and outputs, where two columns are named as it names them
    (`eng_Latn`, `deu_Latn`); any other as it is."""
    if hasattr(tokenizer, "tgt_lang") and len(columns) == 2:
        known = {*tokenizer.all_special_tokens, *getattr(tokenizer, "lang_code_to_id", ())}
        if known.issuperset(columns):
            tokenizer.src_lang, tokenizer.tgt_lang = columns
    return tokenizer


def language_token(tokenizer: Any) -> int | None:
    """Return the token that says which language outputs are written in; None where a tokenizer has no such tokens."""
    language = getattr(tokenizer, "tgt_lang", None)
    if language is None:
        return None
    tokens = getattr(tokenizer, "lang_code_to_id", {})
    return tokens[language] if language in tokens else tokenizer.convert_tokens_to_ids(language)


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, context: int
) -> dict[str, Int[Tensor, "pair token"]]:
    """Return `input_ids`, `attention_mask` and `labels` (-100 at padding) of pairs, each side truncated to `context` tokens.

    Outputs are tokenized as targets, with the target's own special tokens, if the tokenizer distinguishes them.

    Raises:
        UserError: the tokenizer is one of several languages, and its files and `with_languages` leave open which the outputs have.
    """
    if getattr(tokenizer, "tgt_lang", "") is None:
        raise UserError(
            f"{tokenizer.name_or_path}/tokenizer_config.json: expected src_lang and tgt_lang, the languages of inputs and outputs, got no "
            "tgt_lang; add them to the file, or give both as --columns, such as eng_Latn,deu_Latn"
        )
    options = {"truncation": True, "max_length": context, "verbose": False}
    inputs = tokenizer([pair[0] for pair in pairs], **options)["input_ids"]
    labels = tokenizer(text_target=[pair[1] for pair in pairs], **options)["input_ids"]
    padding = tokenizer.pad_token_id or 0
    return {
        "input_ids": padded(inputs, padding),
        "attention_mask": padded([[1] * len(ids) for ids in inputs], 0),
        "labels": padded(labels, IGNORED),
    }


def padded(sequences: Sequence[Sequence[int]], padding: int) -> Int[Tensor, "item token"]:
    """Return sequences of token ids as rows of one length, padded at their ends.

    Raises:
        UserError: one has no token, so that its row would be padding alone.
    """
    if empty := [number for number, ids in enumerate(sequences, 1) if not ids]:
        raise UserError(
            f"data: expected texts with at least one token each, got one without, number {empty[0]} of {len(sequences)}; remove such texts"
        )
    rows = torch.full((len(sequences), max(map(len, sequences))), padding, dtype=torch.long)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return rows
