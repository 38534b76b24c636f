"""A checkpoint rewritten in another layout: which tensors are replaced, by which, and how these are computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoint.cards import UNTOUCHED
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import copy_side_files, write_json
from ..checkpoint.writer import output_bytes, rewrite
from ..core.errors import UserError
from ..families.old_names import with_old_names
from ..runtime.remote import BASE

Read = Callable[[str], Tensor]
Make = Callable[[Read], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that are written together: `replaced` are removed, those in `shapes` take their place, in the shard and dtype of the
    first.
    """

    replaced: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    make: Make = lambda read: {}
    rounds: bool = False
    """Whether the numbers are computed and rounded to the dtype, rather than moved."""


@dataclass(frozen=True, slots=True)
class Export:
    """One checkpoint in a layout: its config, the tensors that change, files of code, and a one-line description."""

    layout: str
    config: Mapping[str, Any]
    pieces: Sequence[Piece]
    description: str
    files: Mapping[str, str] = field(default_factory=dict)
    unchanged: str = UNTOUCHED
    """The sentence that replaces `UNTOUCHED` on the card."""

    @property
    def model_class(self) -> str:
        return self.config["architectures"][0]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear to be written under another name or in another shape.

    `rows` and `columns` select from the old ones in units of `block` (a head); one past the last selects zeros. `inside` reorders
    the rows of every block. `norm` is the layer norm before it, whose gains and offsets are folded in. `bias` adds a bias where
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
    """Return the blocks of an axis in another order, where one past the last is zeros, with the rows of each block reordered by
    `inside`.
    """
    if order is None and inside is None:
        return tensor
    blocks = tensor.unflatten(axis, (-1, block))
    if order is not None and max(order) > blocks.shape[axis]:
        raise UserError(
            f"config.json: expected a tensor with {max(order)} blocks of {block} got shape {tuple(tensor.shape)}; correct it"
        )
    if order is not None:
        blocks = torch.cat([blocks, torch.zeros_like(blocks.narrow(axis, 0, 1))], axis)
        blocks = blocks.index_select(axis, torch.tensor(order))
    if inside is not None:
        blocks = blocks.index_select(axis + 1, torch.tensor(inside))
    return blocks.flatten(axis, axis + 1)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{name}: expected finite numbers in {tensor.dtype}, got others: with the norm before it this linear overflows the dtype"
        )
    return tensor


def moved(old: str, new: str, checkpoint: Checkpoint) -> Piece:
    """Return one tensor under another name."""
    return Piece((old,), {new: tuple(checkpoint.tensors[old].shape)}, lambda read: {new: read(old)})


def filled(old: str, values: Mapping[str, float], size: int, like: Checkpoint) -> Piece:
    """Return constant vectors in the place and dtype of a tensor that is removed."""
    dtype = like.tensors[old].dtype
    shapes = dict.fromkeys(values, (size,))
    return Piece((old,), shapes, lambda read: {n: torch.full((size,), v, dtype=dtype) for n, v in values.items()})


def write_export(
    checkpoint: Checkpoint, made: Export, target: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write weights, config, code and all files beside the weights into the existing directory `target`.

    One piece is in memory at a time. After a kill another call writes the missing shards, with the same bytes.

    Raises:
        UserError: the disk is too small, or numbers overflow the checkpoint's dtype.
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
    write_json(target / "config.json", with_old_names(made.config))
