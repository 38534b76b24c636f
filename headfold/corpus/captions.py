"""Images with one text each, for models with an image and a text tower: one column of images, one of text."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from . import images
from .rows import TABLES, Stream, Table, is_table, open_rows, require, text_of, value
from .sentences import encode_sentences

COLUMNS = ("text", "caption", "sentence")


def read_captions(
    source: str | Table,
    processor: Any,
    tokenizer: Any,
    context: int,
    columns: Sequence[str] = (),
    num_items: int | None = None,
    seed: int | None = None,
    *,
    filled: bool = False,
) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `pixel_values` of the first `num_items` of the source or, with a seed, of as many
    drawn from all of it; `filled` as in `encode_sentences`.

    Raises:
        UserError: a source that is not a table, an empty one, a missing column, or an image that cannot be decoded.
    """
    texts, pixels, name = [], [], source.name if isinstance(source, Table) else source
    for block in images.in_blocks(drawn_captions(source, columns, num_items, seed), name):
        pixels.append(images.processed((image() for image, _ in block), processor, name))
        texts += [text for _, text in block]
    return {**encode_sentences(texts, tokenizer, context, filled=filled), "pixel_values": torch.cat(pixels)}


def drawn_captions(
    source: str | Table, columns: Sequence[str], num_items: int | None, seed: int | None
) -> Iterator[tuple[Callable[[], Any], str]]:
    """Yield a function that decodes an image, and its text, of `num_items` rows as `read_captions` draws them.

    Raises:
        UserError: as `read_captions`.
    """
    if not is_table(source):
        raise UserError(f"{source}: expected images with a text each; give {TABLES}")
    rows, where = open_rows(source), Path(str(source)).parent
    names = require(rows, columns) if columns else _columns(rows)
    if len(names) != 2:
        raise UserError(f"{source}: expected two columns, got {', '.join(names)}; name them with --columns IMAGE,TEXT")
    drawn = rows.draw(
        names,
        num_items,
        seed,
        lambda r: value(r, names[0]) is not None and bool(text_of(r, names[1], rows.name).strip()),
    )
    for row in drawn:
        yield partial(images.decoded, value(row, names[0]), where, "RGB", rows.name), value(row, names[1])


def _columns(rows: Table | Stream) -> tuple[str, ...]:
    found = [next((name for name in names if name in rows.columns), None) for names in (images.COLUMNS, COLUMNS)]
    if None in found:
        raise UserError(
            f"{rows.name}: expected a column of images and one of text, found {', '.join(rows.columns)}; "
            "name them with --columns IMAGE,TEXT"
        )
    return tuple(name for name in found if name is not None)
