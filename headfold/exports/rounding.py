"""The numbers of an export before they were rounded, so that a comparison in float32 is as strict as for any fold.

Gains folded into a linear give products that half precision rounds once more, by as much as it rounded the weights when they were saved.
That would hide a wrong row, so the comparison takes the products as they are, and the written ones must be these, rounded.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from .pieces import Export, Piece


class Unrounded(Mapping[str, Tensor]):
    """Maps tensor names in `target` to their numbers in `dtype`, for those that were rounded to less when they were written."""

    def __init__(self, checkpoint: Checkpoint, made: Export, target: Path, dtype: torch.dtype) -> None:
        self._source, self._written, self._dtype = checkpoint, Checkpoint.open(target), dtype
        self._pieces = {
            name: piece
            for piece in made.pieces
            if piece.rounds and checkpoint.tensors[piece.replaced[0]].dtype.itemsize < dtype.itemsize
            for name in piece.shapes
        }
        self._last: tuple[Piece, Mapping[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        piece = self._pieces[name]
        if self._last is None or self._last[0] is not piece:
            self._last = (piece, piece.make(lambda old: self._source.read(old).to(self._dtype)))
        tensor, written = self._last[1][name], self._written.read(name)
        if not torch.equal(tensor.to(written.dtype), written):
            raise UserError(
                f"{self._written.path}: {name}: expected what was computed, got other numbers; export again"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)
