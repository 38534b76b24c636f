"""Plain text: a file is one document, a folder is its text files."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import UserError
from ..core.files import regular_file
from .bounds import LARGEST_TEXT

SUFFIXES = (".txt", ".md", ".rst", ".py")
"""Suffixes of text files inside a folder. A file that is named itself may have any suffix."""

PIECE = 500_000
"""Characters per piece of a long file when documents are drawn at random, so that the draw covers all of it."""


def text_files(path: Path) -> list[Path]:
    """Return the file itself, or every text file under a folder, sorted by path.

    Raises:
        UserError: the folder contains none, or there is neither a file nor a folder.
    """
    if not path.is_dir():
        return [regular_file(path, "a text file or folder")]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{path}: expected text files ({', '.join(SUFFIXES)}), found none in this folder")
    return files


def read_text(file: Path) -> str:
    """Return what a text file contains.

    Raises:
        UserError: it is not a regular file, not UTF-8, or larger than `LARGEST_TEXT`.
    """
    if (size := regular_file(file, "a text file").stat().st_size) > LARGEST_TEXT:
        raise UserError(
            f"{file}: expected a text of at most {LARGEST_TEXT} bytes, got {size}; divide it among the files of a folder"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected UTF-8 text, got bytes that are not ({error.reason}); convert it") from error


def pieces(text: str, size: int = PIECE) -> list[str]:
    """Return the text split into parts of about `size` characters, at blank lines or form feeds where there are any; nothing is
    lost.

    Only parts longer than `size` are split again, at exactly `size` characters, so that this also works without blank lines.
    """
    parts, current = [], ""
    for block in re.split(r"(?<=\n\n)|(?<=\f)", text):
        if current and len(current) + len(block) > size:
            parts.append(current)
            current = ""
        current += block
    whole = [*parts, current] if current else parts
    return [part[at : at + size] for part in whole for at in range(0, len(part), size)]


def documents(path: Path, seed: int | None = None) -> Iterator[str]:
    """Yield whole files in path order; with a seed, files in random order, with long ones split and their pieces shuffled.

    Raises:
        UserError: a file that is not UTF-8 or larger than `LARGEST_TEXT`, or a folder without text files.
    """
    generator = random.Random(seed)
    files = text_files(path)
    if seed is not None:
        generator.shuffle(files)
    for file in files:
        text = read_text(file)
        parts = [text] if seed is None else pieces(text)
        if seed is not None:
            generator.shuffle(parts)
        yield from parts
