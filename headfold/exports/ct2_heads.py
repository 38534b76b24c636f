"""The attention of a fold as CTranslate2 computes it: in a stack one number of query heads, in groups of equal size within a layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..ct2.model import Heads
from ..families.spec import Attention
from .folded import Entry, Folded, entries_of
from .pieces import picked

Stacks = Mapping[str, tuple[Heads, ...]]


def reordered(tensors: Mapping[str, Tensor], stacks: Stacks) -> dict[str, Tensor]:
    """Return the tensors of a model with projections and tables of relative biases in the order of the written heads."""
    changed = dict(tensors)
    for heads in (heads for layers in stacks.values() for heads in layers):
        num_kv_heads = tensors[f"{heads.names['k']}.weight"].shape[0] // heads.head_dim
        shared = (*range(num_kv_heads), *[num_kv_heads] * (heads.num_kv_heads - num_kv_heads))
        table = f"{heads.names['q'].rpartition('.')[0]}.relative_attention_bias"
        moves = [(heads.names["q"], heads.slots, heads.head_dim, 0), (heads.names["o"], heads.slots, heads.head_dim, 1)]
        moves += [(heads.names[role], shared, heads.head_dim, 0) for role in "kv"] + [(table, heads.slots, 1, 1)]
        for name, order, block, axis in moves:
            for part in ("weight", "bias") if axis == 0 else ("weight",):
                if (key := f"{name}.{part}") in tensors:
                    changed[key] = picked(tensors[key], order, block, axis)
    return changed


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
        total = _num_heads([entry for entries in own.values() for entry, _ in entries])
        for name, entries in own.items():
            written[name] = tuple(_heads(entry, total, scale) for entry, scale in entries)
    return written


def _whole_heads(source: Folded, attention: Attention, scaled: bool) -> Iterator[tuple[Entry, float]]:
    """Yield the attentions with their scale; a head in slots is one head of their dims together."""
    listed = {site["module"]: site for site in (source.config.get("headfold") or {}).get("sites", [])}
    for layer, entry in enumerate(entries_of(source.config, source.family, attention)):
        site = listed.get(attention.at.format(layer=layer, model_type=source.model_type), {})
        scale = (entry.head_dim**-0.5 if scaled else 1.0) * site.get("scale", 1.0)
        yield replace(entry, head_dim=entry.head_dim * site.get("slots", 1)), scale


def _num_heads(entries: Sequence[Entry]) -> int:
    """Return the least number of query heads that every layer of a stack can be filled up to, by equal groups."""
    total = max(entry.num_heads for entry in entries)
    while not all(_num_kv_heads(entry, total) for entry in entries):
        total += 1
    return total


def _num_kv_heads(entry: Entry, total: int) -> int:
    """Return the least number of K/V heads whose equal groups of `total` query heads hold those of the fold, 0 where none does."""
    least, most = entry.groups.num_kv_heads, total // entry.group_size
    return next((count for count in range(least, most + 1) if total % count == 0), 0)


def _heads(entry: Entry, total: int, scale: float) -> Heads:
    """Return one attention filled up to `total` query heads."""
    num_kv_heads = _num_kv_heads(entry, total)
    slots = entry.slots(total // num_kv_heads)
    return Heads(entry.names, (*slots, *[entry.num_heads] * (total - len(slots))), num_kv_heads, entry.head_dim, scale)
