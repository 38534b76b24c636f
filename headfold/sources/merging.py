"""Merge a LoRA adapter into the stream of its base's weights, one tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import UserError, listed
from ..hf_models.building import names_in_model
from .adapter import Adapter
from .weights import Weights

_TRANSPOSED = ("gpt2",)
"""Models whose linears keep their weights as (inputs, outputs)."""


def merge_adapter(weights: Weights, adapter: Adapter, base: Path) -> Weights:
    """Return the weights of the base with the adapter merged.

    Raises:
        UserError: the adapter names modules that the base does not have, while it is opened; shapes of another base, in the stream.
    """
    own = _own_names([*(f"{module}.weight" for module in adapter.added), *adapter.replaced], weights, adapter, base)
    added = {own[f"{module}.weight"]: module for module in adapter.added}
    replaced = {own[name]: name for name in adapter.replaced}
    transposed = bool(adapter.config.get("fan_in_fan_out")) or weights.config.get("model_type") in _TRANSPOSED
    said = f"the LoRA adapter {adapter.path.resolve().name} merged"
    return replace(
        weights,
        tensors=partial(_tensors, weights, adapter, added, replaced, transposed),
        origin=f"{weights.origin}, {said}" if weights.origin else said,
    )


def _own_names(named: Sequence[str], weights: Weights, adapter: Adapter, base: Path) -> Mapping[str, str]:
    """Return, for each tensor that the adapter names, the name in the base: the same, one prefix more or less, or the one that is loaded
    into the same parameter, as peft names modules as they run, and files keep the names of the version that wrote them.

    Raises:
        UserError: the base has none, or several.
    """
    found = {name: _similar(name, weights.names) for name in named}
    if any(len(own) != 1 for own in found.values()) and weights.config.get("architectures"):
        parameters = names_in_model(weights.config, (*weights.names, *named), f"{base}/config.json")
        loaded = {parameters[own]: own for own in weights.names if own in parameters}
        found |= {name: [loaded[parameters[name]]] for name in named if parameters.get(name) in loaded}
    for name, own in found.items():
        if len(own) != 1:
            made_for = adapter.config.get("base_model_name_or_path")
            raise UserError(
                f"{adapter.path}: expected modules of {base}, got {name}, which it {'has several of' if own else 'lacks'}; pass the model "
                f"that the adapter was made for ({made_for!r:.80} by its config)"
            )
    return {name: own[0] for name, own in found.items()}


def _similar(name: str, names: Sequence[str]) -> list[str]:
    """Return the same name or, where it is not among the names, those with one prefix more or less."""
    if name in names:
        return [name]
    return [own for own in names if own.endswith(f".{name}") or name.endswith(f".{own}")]


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
