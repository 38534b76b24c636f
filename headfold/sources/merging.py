"""Merge a LoRA adapter into the stream of its base's weights, one tensor at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import UserError, listed
from .adapter import Adapter
from .weights import Weights

_TRANSPOSED = ("gpt2",)
"""Models whose linears keep their weights as (inputs, outputs)."""


def merge_adapter(weights: Weights, adapter: Adapter, base: Path) -> Weights:
    """Return the weights of the base with the adapter merged.

    Raises:
        UserError: the adapter names modules that the base does not have, while it is opened; shapes of another base, in the stream.
    """
    added = {_name_of(f"{module}.weight", weights, adapter, base): module for module in adapter.added}
    replaced = {_name_of(name, weights, adapter, base): name for name in adapter.replaced}
    transposed = bool(adapter.config.get("fan_in_fan_out")) or weights.config.get("model_type") in _TRANSPOSED
    said = f"the LoRA adapter {adapter.path.resolve().name} merged"
    return replace(
        weights,
        tensors=partial(_tensors, weights, adapter, added, replaced, transposed),
        origin=f"{weights.origin}, {said}" if weights.origin else said,
    )


def _name_of(name: str, weights: Weights, adapter: Adapter, base: Path) -> str:
    """Return the name in the base of a tensor that the adapter names: the same, or one prefix more or less.

    Raises:
        UserError: the base has none, or several.
    """
    if name in weights.names:
        return name
    found = [own for own in weights.names if own.endswith(f".{name}") or name.endswith(f".{own}")]
    if len(found) == 1:
        return found[0]
    made_for = adapter.config.get("base_model_name_or_path")
    raise UserError(
        f"{adapter.path}: expected modules of {base}, got {name}, which it {'has several of' if found else 'lacks'}; pass the model that "
        f"the adapter was made for ({made_for!r:.80} by its config)"
    )


def _tensors(
    weights: Weights, adapter: Adapter, added: Mapping[str, str], replaced: Mapping[str, str], transposed: bool
) -> Iterator[tuple[str, Tensor]]:
    left = {*added, *replaced}
    for name, tensor in weights.tensors():
        left.discard(name)
        where = f"{adapter.path}: {name}"
        if name in replaced:
            new = adapter.replaced[replaced[name]]
            _check_shape(where, tensor, tuple(new.shape))
            tensor = new.to(tensor.dtype)
        if name in added:
            tensor = _merged(tensor, adapter, added[name], transposed, where)
        yield name, tensor
    if left:
        raise UserError(
            f"{adapter.path}: expected tensors of its base, got {listed(sorted(left))}; pass the model it was made for"
        )


def _merged(weight: Tensor, adapter: Adapter, module: str, transposed: bool, where: str) -> Tensor:
    """Return a weight with its low-rank product added, computed in float32 or, if it has more digits, in its own dtype.

    A DoRA then gives every output the norm that it learnt for it.
    """
    parts = adapter.added[module]
    embeds = "embedding_A" in parts
    down, up = (parts[f"embedding_{side}" if embeds else side] for side in "AB")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    product = up.to(dtype) @ down.to(dtype) * adapter.scaling(module, len(down))
    square = len(product) == product.shape[1]
    turned = embeds or (transposed if square else tuple(weight.shape) == tuple(product.T.shape))
    rows = (weight.T if turned and weight.dim() == 2 else weight).to(dtype)
    _check_shape(where, rows, tuple(product.shape))
    new = rows + product
    if (magnitude := parts.get("magnitude")) is not None:
        _check_shape(f"{where}: magnitude", magnitude.reshape(-1), (len(new),))
        new = new * (magnitude.reshape(-1, 1).to(dtype) / new.norm(dim=1, keepdim=True))
    return (new.T if turned else new).to(weight.dtype).contiguous()


def _check_shape(where: str, found: Tensor, expected: tuple[int, ...]) -> None:
    """Refuse a tensor of the base that has another shape than the adapter was made for."""
    if tuple(found.shape) != expected:
        raise UserError(
            f"{where}: expected a base with the shape {expected}, got {tuple(found.shape)}; pass the model that the adapter was made for, "
            "not a fold of it"
        )
