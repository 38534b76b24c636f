"""A candidate for the attention sites of a toy model, and tests of whether changes of its heads change the logits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..core.equivalents import key_transform
from ..core.heads import Heads, KeyFreedom
from ..families.layout import read_heads, write_heads
from ..families.spec import Family, Site, sites
from .toy import ToyModel, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-9
"""Largest change of the logits, relative to the largest, that reordering sums in float64 causes. Real changes are above 1e-3."""

Change = Callable[[Heads, int], Heads]
"""Maps the heads of the i-th site to those that replace them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A toy model and the attention sites that a literal claims it to have."""

    toy_model: ToyModel
    sites: tuple[Site, ...]

    @classmethod
    def of(cls, toy_model: ToyModel, family: Family) -> "Candidate":
        """Return the toy model with the sites of a literal."""
        return cls(toy_model, tuple(sites(family, toy_model.config, toy_model.tensors)))

    def heads(self, site: Site) -> Heads:
        """Return the heads of a site."""
        return read_heads(site, self.toy_model.tensors.__getitem__)

    def changed_tensors(self, change: Change) -> dict[str, Tensor]:
        """Return the attention tensors after a change of the heads, by their names on disk."""
        made: dict[str, Tensor] = {}
        for index, site in enumerate(self.sites):
            made |= write_heads(site, change(self.heads(site), index))
        return made

    @contextmanager
    def installed_heads(self, tensors: Mapping[str, Tensor]) -> Iterator["PreTrainedModel"]:
        """Let the model have other attention tensors, given by their names on disk, inside the block."""
        places = {disk: path for site in self.sites for disk, path in site.parameters.items()}
        parameters = {name: self.toy_model.model.get_parameter(places[name]) for name in tensors}
        try:
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
            yield self.toy_model.model
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(self.toy_model.tensors[name])

    def logits_with(self, change: Change) -> Tensor:
        """Return the logits after a change."""
        with self.installed_heads(self.changed_tensors(change)) as model:
            return logits(model)

    def logit_change(self, change: Change) -> float:
        """Return the largest change of the logits, relative to the largest logit."""
        return distance(self.logits_with(change), self.toy_model.logits)

    def is_invariant(self, change: Change) -> bool:
        """Return whether the change leaves the logits as they are."""
        return self.logit_change(change) <= TOLERANCE


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `b`; infinite if one of them is not finite."""
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max()).item()


def only_at(index: int, change: Change) -> Change:
    """Return the change at one site only."""
    return lambda heads, i: change(heads, i) if i == index else heads


def keys(freedom: KeyFreedom, seed: int = 0) -> Change:
    """Return the change that applies to every K head a random transformation that the freedom allows, and the inverse to its
    query heads."""

    def change(heads: Heads, index: int) -> Heads:
        generator = torch.Generator().manual_seed(seed + index)
        transforms = [key_transform(freedom, heads.head_dim, generator) for _ in range(heads.num_kv_heads)]
        on_k, on_q = (torch.stack(matrices) for matrices in zip(*transforms, strict=True))
        return replace(heads, q=on_q[_kv_head_of_query(heads)] @ heads.q, k=on_k @ heads.k)

    return change


def values(heads: Heads, index: int) -> Heads:
    """Apply an invertible matrix to every V head, and the inverse to its output heads."""
    generator = torch.Generator().manual_seed(1000 + index)
    transforms = [key_transform(KeyFreedom("any"), heads.v.shape[1], generator) for _ in range(heads.num_kv_heads)]
    on_v, on_o = (torch.stack(matrices) for matrices in zip(*transforms, strict=True))
    return replace(heads, v=on_v @ heads.v, o=on_o[_kv_head_of_query(heads)] @ heads.o)


def shuffled(heads: Heads, index: int) -> Heads:
    """Put K/V heads in another order with their query heads, and those in another order among themselves."""
    generator = Generator().manual_seed(2000 + index)
    each = heads.num_heads // heads.num_kv_heads
    new = torch.randperm(heads.num_kv_heads, generator=generator)
    order = [int(group) * each + int(i) for group in new for i in torch.randperm(each, generator=generator)]
    moved = heads.reorder(tuple(order))
    return replace(moved, k=heads.k[new], v=heads.v[new], groups=heads.groups)


def _kv_head_of_query(heads: Heads) -> Tensor:
    return torch.tensor(heads.groups.group_of_head)


def reversed_keys(heads: Heads, index: int) -> Heads:
    """Reverse the dims of K. This must change the output of any attention."""
    del index
    return replace(heads, k=heads.k.flip(1))
