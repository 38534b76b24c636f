"""A toy model on which heads can be changed, and whether its logits show it."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Generator, Tensor

from ..core.equivalents import key_transform
from ..core.heads import Heads, KeyFreedom
from ..families.layout import read_heads, write_heads
from ..families.spec import Family, Site, sites
from ..hf_models import quiet
from .shrink import Config
from .toy import Subject, Unproven, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSEEN = 1e-9
"""Largest difference of logits, relative to the largest, that re-association in float64 makes. Real ones are above 1e-3."""

Change = Callable[[Heads, int], Heads]
"""The heads of the i-th site → those to try in their place."""


@dataclass(frozen=True, slots=True)
class Specimen:
    """A toy model with what `save_pretrained` writes of it."""

    model: "PreTrainedModel"
    config: Config
    tensors: Mapping[str, Tensor]
    plain: Float[Tensor, "sequence position vocabulary"]

    @classmethod
    def of(cls, subject: Subject, seed: int = 0) -> "Specimen":
        model = subject.build(seed)
        with tempfile.TemporaryDirectory(prefix="headfold-probe-") as directory, quiet():
            model.save_pretrained(directory)
            config = json.loads((Path(directory) / "config.json").read_text())
            tensors = load_file(Path(directory) / "model.safetensors")
        plain = logits(model)
        if not torch.isfinite(plain).all():
            raise Unproven("its toy model gives logits that are not finite, so nothing can be told from them")
        return cls(model, config, tensors, plain)

    def on_disk(self, parameter: str) -> str:
        """The name under which a parameter is stored, found by its numbers where the two differ."""
        value = self.model.get_parameter(parameter)
        if parameter in self.tensors and torch.equal(self.tensors[parameter], value):
            return parameter
        same = [name for name, t in self.tensors.items() if t.shape == value.shape and torch.equal(t, value)]
        if len(same) != 1:
            raise Unproven(
                f"{parameter} is not stored as it stands in the model; expected one tensor of the checkpoint"
            )
        return same[0]

    def under(self, family: Family) -> "Trial":
        """The sites that a literal says there are."""
        return Trial(self, tuple(sites(family, self.config, self.tensors)))


@dataclass(frozen=True, slots=True)
class Trial:
    """A specimen whose attention sites are claimed to be known."""

    specimen: Specimen
    sites: tuple[Site, ...]

    def heads(self, site: Site) -> Heads:
        return read_heads(site, self.specimen.tensors.__getitem__)

    def changed(self, change: Change) -> dict[str, Tensor]:
        """The attention tensors by their names on disk once heads are changed."""
        made = {}
        for index, site in enumerate(self.sites):
            made |= write_heads(site, change(self.heads(site), index))
        return made

    @contextmanager
    def installed_heads(self, tensors: Mapping[str, Tensor]) -> Iterator["PreTrainedModel"]:
        """The model with other attention tensors, by their names on disk."""
        places = {disk: path for site in self.sites for disk, path in site.parameters.items()}
        parameters = {name: self.specimen.model.get_parameter(places[name]) for name in tensors}
        try:
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
            yield self.specimen.model
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(self.specimen.tensors[name])

    def compared_output(self, change: Change) -> Tensor:
        with self.installed_heads(self.changed(change)) as model:
            return logits(model)

    def shows(self, change: Change) -> float:
        """How far the logits move, relative to the largest."""
        return distance(self.compared_output(change), self.specimen.plain)

    def hides(self, change: Change) -> bool:
        """Whether attention cannot see the change."""
        return self.shows(change) <= UNSEEN


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest of `b`; infinite where either is not finite."""
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max()).item()


def only_at(index: int, change: Change) -> Change:
    """The change at one site."""
    return lambda heads, i: change(heads, i) if i == index else heads


def keys(freedom: KeyFreedom, seed: int = 0) -> Change:
    """Every K head takes a transformation that the freedom claims, its query heads the inverse."""

    def change(heads: Heads, index: int) -> Heads:
        generator = torch.Generator().manual_seed(seed + index)
        turns = [key_transform(freedom, heads.head_dim, generator) for _ in range(heads.num_kv_heads)]
        on_k, on_q = (torch.stack(matrices) for matrices in zip(*turns, strict=True))
        return replace(heads, q=on_q[_reads(heads)] @ heads.q, k=on_k @ heads.k)

    return change


def values(heads: Heads, index: int) -> Heads:
    """Every V head takes some invertible matrix, its output heads the inverse."""
    generator = torch.Generator().manual_seed(1000 + index)
    turns = [key_transform(KeyFreedom("any"), heads.v.shape[1], generator) for _ in range(heads.num_kv_heads)]
    on_v, on_o = (torch.stack(matrices) for matrices in zip(*turns, strict=True))
    return replace(heads, v=on_v @ heads.v, o=on_o[_reads(heads)] @ heads.o)


def shuffled(heads: Heads, index: int) -> Heads:
    """K/V heads in another order with their query heads, and these in another order among themselves."""
    generator = Generator().manual_seed(2000 + index)
    each = heads.num_heads // heads.num_kv_heads
    new = torch.randperm(heads.num_kv_heads, generator=generator)
    order = [int(group) * each + int(i) for group in new for i in torch.randperm(each, generator=generator)]
    moved = heads.reorder(tuple(order))
    return replace(moved, k=heads.k[new], v=heads.v[new], groups=heads.groups)


def _reads(heads: Heads) -> Tensor:
    return torch.tensor(heads.groups.group_of_head)


def ruined(heads: Heads, index: int) -> Heads:
    """K with its dims in reverse order: no attention may fail to see that, else it sees nothing."""
    del index
    return replace(heads, k=heads.k.flip(1))
