"""A checkpoint written again in another layout: which tensors go, which come in their place, and who computes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import copy_side_files, write_json
from ..checkpoint.writer import output_bytes, rewrite
from ..core.errors import UserError
from ..runtime.remote import BASE

Read = Callable[[str], Tensor]
Make = Callable[[Read], Mapping[str, Tensor]]


UNTOUCHED = "all tensors outside attention are the original's, byte for byte"
"""What the card of a fold says of the rest of the model."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that go together: `replaced` leave, those in `shapes` come, in the shard and dtype of the first that leaves."""

    replaced: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    make: Make = lambda read: {}
    rounds: bool = False
    """Whether the numbers are new ones, rounded to the dtype, and not the old ones in other places."""


@dataclass(frozen=True, slots=True)
class Export:
    """A layout of one checkpoint: its config, the tensors that change, files of code, and one line that says what it is."""

    layout: str
    config: Mapping[str, Any]
    pieces: Sequence[Piece]
    description: str
    files: Mapping[str, str] = field(default_factory=dict)
    unchanged: str = UNTOUCHED
    """The same of the export."""

    @property
    def model_class(self) -> str:
        return self.config["architectures"][0]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear to be written under another name or in another shape.

    `rows` and `columns` pick from the old ones in units of `block` (a head); one past the last picks zeros. `inside` reorders
    the rows of every block. `norm` is the layer norm before it, whose gains and offsets it takes in. `bias` writes one where
    the old linear has none.
    """

    old: str
    new: str
    rows: Sequence[int] | None = None
    columns: Sequence[int] | None = None
    block: int = 1
    inside: Sequence[int] | None = None
    norm: str = ""
    bias: bool = False

    def piece(self, checkpoint: Checkpoint) -> Piece:
        has_bias = f"{self.old}.bias" in checkpoint.tensors
        outs, ins = checkpoint.tensors[f"{self.old}.weight"].shape
        outs = outs if self.rows is None else len(self.rows) * self.block
        ins = ins if self.columns is None else len(self.columns) * self.block
        shapes: dict[str, tuple[int, ...]] = {f"{self.new}.weight": (outs, ins)}
        shapes |= {f"{self.new}.bias": (outs,)} if has_bias or self.bias or self.norm else {}
        replaced = (f"{self.old}.weight", *([f"{self.old}.bias"] if has_bias else []))
        return Piece(replaced, shapes, self._make(has_bias, frozenset(shapes)), rounds=bool(self.norm))

    def _make(self, has_bias: bool, names: frozenset[str]) -> Make:
        def make(read: Read) -> dict[str, Tensor]:
            stored = read(f"{self.old}.weight")
            weight = stored.double() if self.norm else stored
            bias = read(f"{self.old}.bias").to(weight.dtype) if has_bias else weight.new_zeros(len(weight))
            if self.norm:
                bias = bias + weight @ read(f"{self.norm}.bias").double()
                weight = weight * read(f"{self.norm}.weight").double()
            weight, bias = (picked(t, self.rows, self.block, 0, self.inside) for t in (weight, bias))
            weight = picked(weight, self.columns, self.block, 1)
            made = {f"{self.new}.weight": weight, f"{self.new}.bias": bias}
            return {name: _finite(name, made[name].to(stored.dtype)) for name in names}

        return make


def picked(
    tensor: Float[Tensor, "..."],
    order: Sequence[int] | None,
    block: int,
    axis: int,
    inside: Sequence[int] | None = None,
) -> Float[Tensor, "..."]:
    """Blocks of an axis in another order, one past the last being zeros; and each of them reordered `inside`."""
    if order is None and inside is None:
        return tensor
    blocks = tensor.unflatten(axis, (-1, block))
    if order is not None:
        blocks = torch.cat([blocks, torch.zeros_like(blocks.narrow(axis, 0, 1))], axis)
        blocks = blocks.index_select(axis, torch.tensor(order))
    if inside is not None:
        blocks = blocks.index_select(axis + 1, torch.tensor(inside))
    return blocks.flatten(axis, axis + 1)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{name}: not finite in {tensor.dtype}; expected numbers: the norm before it overflows the dtype"
        )
    return tensor


def moved(old: str, new: str, checkpoint: Checkpoint) -> Piece:
    """One tensor under another name."""
    return Piece((old,), {new: tuple(checkpoint.tensors[old].shape)}, lambda read: {new: read(old)})


def filled(old: str, values: Mapping[str, float], size: int, like: Checkpoint) -> Piece:
    """Constant vectors in the place and dtype of a tensor that goes."""
    dtype = like.tensors[old].dtype
    shapes = dict.fromkeys(values, (size,))
    return Piece((old,), shapes, lambda read: {n: torch.full((size,), v, dtype=dtype) for n, v in values.items()})


def write_export(
    checkpoint: Checkpoint, made: Export, target: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write weights, config, code and all that lies beside the weights into the existing directory `target`.

    One piece is in memory at a time. After a kill another call writes the missing shards, and the same bytes.

    Raises:
        UserError: the disk cannot hold it, or numbers that overflow the checkpoint's dtype.
    """
    by_name = {piece.replaced[0]: piece for piece in made.pieces}
    shapes = {name: shape for piece in made.pieces for name, shape in piece.shapes.items()}
    owner = {name: piece.replaced[0] for piece in made.pieces for name in piece.shapes}
    removed: dict[str, tuple[str, ...]] = {old: () for piece in made.pieces for old in piece.replaced}
    instead = removed | {first: tuple(piece.shapes) for first, piece in by_name.items()}
    total, done = output_bytes(checkpoint, shapes, instead), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    rewrite(
        checkpoint, target, shapes, owner, lambda name: by_name[name].make(checkpoint.read), advance, instead
    )  # fmt: skip
    copy_side_files(checkpoint.path, target)
    (target / f"{BASE}.py").unlink(missing_ok=True)
    for name, text in made.files.items():
        (target / name).write_text(text)
    write_json(target / "config.json", dict(made.config))
