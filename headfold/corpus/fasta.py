"""Sequences of a FASTA file, for protein models: a line that begins with `>` names the sequence on the lines that follow it."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..core.errors import UserError
from .bounds import LONGEST_LINE, MOST_ROWS, check_rows
from .lines import lines_of
from .rows import Row, Table

SUFFIXES = (".fasta", ".fa", ".faa")


def is_fasta(path: Path) -> bool:
    """Return whether the name is that of a FASTA file, plain or `.gz`."""
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def sequences(path: Path) -> Table:
    """Return the sequences as a table with the column `text`, without their names and without the `*` that ends some.

    Raises:
        UserError: as `parallel_lines`, text before the first name, or a sequence of more than `LONGEST_LINE` letters.
    """
    count = sum(1 for _ in itertools.islice(_read(path), MOST_ROWS + 1))
    check_rows(count, path)

    def take(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        del columns
        wanted = iter(numbers)
        following = next(wanted, None)
        for number, sequence in enumerate(_read(path)):
            if following is None:
                return
            if number == following:
                yield {"text": sequence}
                following = next(wanted, None)

    return Table(str(path), ("text",), count, take)


def _read(path: Path) -> Iterator[str]:
    """Yield the sequences that are not empty."""
    parts: list[str] = []
    length, named = 0, False
    for line in lines_of(path):
        if line.startswith(">"):
            yield from _joined(parts)
            parts, length, named = [], 0, True
            continue
        part = line.strip()
        if part and not named:
            raise UserError(
                f"{path}: expected FASTA, whose sequences follow a line that begins with >, got {part!r:.40} first; correct the file, or "
                "name it .txt if each line is a sequence"
            )
        parts.append(part)
        length += len(part)
        if length > LONGEST_LINE:
            raise UserError(
                f"{path}: expected sequences of at most {LONGEST_LINE} letters, got a longer one; divide it into several"
            )
    yield from _joined(parts)


def _joined(parts: Sequence[str]) -> Iterator[str]:
    sequence = "".join(parts).rstrip("*")
    if sequence:
        yield sequence
