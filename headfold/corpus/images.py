"""Images: a folder of them, or a column of encoded ones, through the model's own processor."""

import io
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UserError
from .rows import TABLES, Row, Stream, Table, file_of, is_table, open_rows, require, value

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
COLUMNS = ("image", "img")
LABELS = ("label", "labels")
BLOCK = 64
"""Images in a block, which the processor's output replaces before the next ones are read."""
MOST_PIXELS = 2**27
"""Pixels of an image; a small file may hold any number. Images of so many together are processed before others are decoded."""
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that pillow decodes by itself; it would start another program for others, such as EPS."""


def _open(source: str | Table, label2id: Mapping[str, int]) -> Table | Stream:
    """Return the rows of a source of images, not decoded yet. If all folders are named like labels, an image's folder is its
    label.

    Raises:
        UserError: there is no such source, or no image in it.
    """
    if isinstance(source, Table) or is_table(source):
        return open_rows(source)
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder; expected a folder of images, {TABLES}")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if not files:
        raise UserError(f"{source}: an image model needs images, found none; give a folder of images or {TABLES}")

    def take(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        del columns
        return ({"image": {"path": str(files[n])}, "label": files[n].parent.name} for n in numbers)

    is_labelled = all(file.parent.name in label2id for file in files)
    return Table(source, ("image", "label") if is_labelled else ("image",), len(files), take)


def _columns(rows: Table | Stream, named: Sequence[str]) -> tuple[str, ...]:
    """Return the column of images and, if there is one, that of labels."""
    if named:
        return require(rows, named)
    found = [next((name for name in names if name in rows.columns), None) for names in (COLUMNS, LABELS)]
    if found[0] is None:
        raise UserError(
            f"{rows.name}: an image model needs a column of images, found {', '.join(rows.columns)}; "
            "name it with --columns IMAGE or IMAGE,LABEL"
        )
    return tuple(name for name in found if name is not None)


def image_blocks(
    source: str | Table,
    processor: Any,
    *,
    columns: Sequence[str] = (),
    num_items: int | None = None,
    seed: int | None = None,
    label2id: Mapping[str, int] | None = None,
    num_channels: int = 3,
) -> Iterator[dict[str, Tensor]]:
    """Yield `pixel_values` (image, channel, height, width) in float32 and, if known, `labels` (image,), one block at a time.

    The images are the first `num_items` of the source or, with a seed, as many drawn from all of it.

    Raises:
        UserError: an unreadable or empty source, a missing column, an image that cannot be decoded, an unknown label.
    """
    rows = _open(source, label2id or {})
    names, where = _columns(rows, columns), Path(str(source)).parent
    drawn = rows.draw(names, num_items, seed, lambda row: value(row, names[0]) is not None)
    mode = "RGB" if num_channels == 3 else "L"
    for block in in_blocks(drawn, rows.name):
        found = (decoded(value(row, names[0]), where, mode, rows.name) for row in block)
        sample = {"pixel_values": processed(found, processor, rows.name)}
        labels = [label_id(value(row, names[1]), label2id or {}, rows.name) for row in block] if names[1:] else []
        yield sample | ({"labels": torch.tensor(labels)} if labels else {})


def in_blocks(drawn: Iterator[Any], source: str) -> Iterator[list[Any]]:
    """Yield what is drawn from a source, rows or what is made of them, in lists of `BLOCK`.

    Raises:
        UserError: there are no rows.
    """
    block = list(itertools.islice(drawn, BLOCK))
    if not block:
        raise UserError(f"{source}: expected images, found none; give another source")
    while block:
        yield block
        block = list(itertools.islice(drawn, BLOCK))


def decoded(found: Any, folder: Path, mode: str, where: str) -> Any:
    """Return the image that a row contains: pillow's own, its bytes, a mapping with `bytes` or `path`, or a path (relative to the
    source's folder)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"{where}: reading images needs pillow; pip install 'headfold[images]'") from error
    if isinstance(found, Image.Image):
        return found.convert(mode)
    entry = found if isinstance(found, Mapping) else {"bytes" if isinstance(found, bytes) else "path": found}
    data, path = entry.get("bytes"), entry.get("path")
    file: io.BytesIO | Path
    if isinstance(data, bytes):
        file = io.BytesIO(data)
    elif isinstance(path, str):
        file = file_of(path, folder, where)
    else:
        raise UserError(
            f"{where}: expected an encoded image or its path, got {type(found).__name__}; name another column"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound follows
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels, expected at most {MOST_PIXELS} in all")
                return image.convert(mode)
    # Pillow's types for a bad header, a cut file, a bad PNG chunk, and for even larger images.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        what = f": {path}" if isinstance(path, str) else ""
        reason = "not an image that pillow reads" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"{where}{what}: unreadable image ({reason}); remove it or name another column") from error


def processed(images: Iterator[Any], processor: Any, where: str) -> Float[Tensor, "image channel height width"]:
    """Return images as the model takes them, in float32; no more of them are in memory than have `MOST_PIXELS`, and one."""
    done: list[Tensor] = []
    waiting: list[Any] = []
    for image in images:
        waiting.append(image)
        if sum(one.width * one.height for one in waiting) > MOST_PIXELS:
            done.append(_processed(waiting, processor, where))
            waiting = []
    return torch.cat([*done, *([_processed(waiting, processor, where)] if waiting else [])])


def _processed(images: list[Any], processor: Any, where: str) -> Float[Tensor, "image channel height width"]:
    try:
        return processor(images=images, return_tensors="pt")["pixel_values"].float()
    except ValueError as error:
        sizes = ", ".join(sorted({f"{image.width}x{image.height}" for image in images})[:4])
        raise UserError(
            f"{where}: the model's processor refuses images of {sizes} ({str(error).splitlines()[0]})"
        ) from error


def label_id(label: Any, label2id: Mapping[str, int], where: str) -> int:
    """Return the number of a class, given that number or, by the config's `label2id`, its name.

    Raises:
        UserError: there is no such class.
    """
    if isinstance(label, int):
        return label
    if isinstance(label, str) and type(number := label2id.get(label)) is int:
        return number
    known = ", ".join(list(label2id)[:5])
    raise UserError(
        f"{where}: expected classes of the model ({known} …), got the label {label!r:.60}; give numbers or names of its config"
    )
