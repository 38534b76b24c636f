"""The attention of a fold as CTranslate2 computes it: in a stack one number of query heads, in groups of equal size within a layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .folded import Entry, Folded, entries_of
from .pieces import picked

Tensors = Mapping[str, Tensor]
"""The parameters of a model by their names in it."""
Projection = tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"] | None]
"""Weight and bias; None where there is no bias."""


@dataclass(frozen=True, slots=True)
class Heads:
    """One attention as it is written: query heads by K/V head, filled up with zero heads.

    `slots` and `kv_slots` map a written head to the head of the fold, one past the last is a zero head. `scale` is that of the softmax.
    """

    entry: Entry
    slots: tuple[int, ...]
    kv_slots: tuple[int, ...]
    scale: float

    @property
    def num_kv_heads(self) -> int:
        return len(self.kv_slots)

    def inputs(self, tensors: Tensors, roles: str, queries_factor: float = 1.0) -> Projection:
        """Return the projections of `roles`, one below the other."""
        found = [self._rows(tensors, role) for role in roles]
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in found]
        has_bias = any(bias is not None for _, bias in found)
        return torch.cat([weight for weight, _ in found]), torch.cat(biases) if has_bias else None

    def output(self, tensors: Tensors) -> Projection:
        """Return the output projection."""
        name = self.entry.names["o"]
        return picked(tensors[f"{name}.weight"], self.slots, self.entry.head_dim, 1), tensors.get(f"{name}.bias")

    def table(self, table: Float[Tensor, "bucket head"]) -> Float[Tensor, "bucket slot"]:
        """Return a table of relative biases with the columns of the written heads."""
        return picked(table, self.slots, 1, 1)

    def _rows(self, tensors: Tensors, role: str) -> Projection:
        name, order = self.entry.names[role], self.slots if role == "q" else self.kv_slots
        bias = tensors.get(f"{name}.bias")
        dim = self.entry.head_dim
        return picked(tensors[f"{name}.weight"], order, dim, 0), None if bias is None else picked(bias, order, dim, 0)


def stacks(source: Folded, scaled: bool = True) -> dict[str, tuple[Heads, ...]]:
    """Return every attention of a model by layer; the keys are `encoder.self`, `decoder.self`, `decoder.cross`, or `layers.self`.

    Without `scaled` the softmax has no scale, as in T5.
    """
    found = {
        attention.name.replace(".{layer}", ""): list(_whole_heads(source, attention, scaled))
        for attention in source.family.attentions
    }
    written: dict[str, tuple[Heads, ...]] = {}
    for stack in dict.fromkeys(name.partition(".")[0] for name in found):
        own = {name: entries for name, entries in found.items() if name.startswith(f"{stack}.")}
        shape = _shape([entry for entries in own.values() for entry, _ in entries])
        for name, entries in own.items():
            written[name] = tuple(_heads(entry, *shape(entry), scale) for entry, scale in entries)
    return written


def _whole_heads(source: Folded, attention: Any, scaled: bool) -> Iterator[tuple[Entry, float]]:
    """Yield the attentions with their scale; a head in slots is one head of their dims together."""
    listed = {site["module"]: site for site in (source.config.get("headfold") or {}).get("sites", [])}
    for layer, entry in enumerate(entries_of(source.config, source.family, attention)):
        site = listed.get(attention.at.format(layer=layer, model_type=source.model_type), {})
        scale = (entry.head_dim**-0.5 if scaled else 1.0) * site.get("scale", 1.0)
        yield replace(entry, head_dim=entry.head_dim * site.get("slots", 1)), scale


def _shape(entries: Sequence[Entry]) -> Any:
    """Return the function of an attention's numbers of query and K/V heads, zero heads included.

    The number of query heads is the least that every layer can be filled up to; the K/V heads then divide it.
    """
    total = max(entry.num_heads for entry in entries)
    while not all(_num_kv_heads(entry, total) for entry in entries):
        total += 1
    return lambda entry: (total, _num_kv_heads(entry, total))


def _num_kv_heads(entry: Entry, total: int) -> int:
    """Return the least number of K/V heads whose equal groups of `total` query heads hold those of the fold, 0 where none does."""
    least, most = entry.groups.num_kv_heads, total // entry.group_size
    return next((count for count in range(least, most + 1) if total % count == 0), 0)


def _heads(entry: Entry, total: int, num_kv_heads: int, scale: float) -> Heads:
    slots = entry.slots(total // num_kv_heads)
    slots += (entry.num_heads,) * (total - len(slots))
    fold = entry.groups.num_kv_heads
    return Heads(entry, slots, (*range(fold), *[fold] * (num_kv_heads - fold)), scale)
