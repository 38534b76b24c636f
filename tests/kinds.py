"""One tiny model of each kind, for laws that train or fold anew: families of a kind differ in names alone."""

from dataclasses import fields

from tiny import FOREIGN, TINY

from headfold.families import family_of
from headfold.families.spec import Attention

_NAMES = {
    "name", "at", "o", "core", "model_at", "model_names", "layers", "heads", "head_dim", "hidden_size", "input_norm"
}  # fmt: skip
"""Fields of an attention that say what things are called."""
_CHOICES = {"fused", "order", "stack"}
"""Fields whose values are no names."""


def kind_of(name: str) -> tuple[object, ...]:
    """Return what tells a tiny model from those of other families: its projections, freedoms and config, without names."""
    config = TINY[name]() if name in TINY else FOREIGN[name].config()
    family = family_of(config.to_dict(), name)
    attentions = tuple(
        tuple(
            getattr(one, field.name) if field.name in _CHOICES else bool(getattr(one, field.name))
            for field in fields(Attention)
            if field.name not in _NAMES
        )
        + (bool(one.core),)
        for one in family.attentions
    )
    rope = family.position
    position = rope and (rope.interleaved, bool(rope.fraction), bool(rope.dim), bool(rope.layers))
    heads = [getattr(config, field, None) for field in ("num_attention_heads", "num_key_value_heads")]
    grouped = None not in heads and heads[0] != heads[1]
    return (attentions, position, family.norm_gain_offset, grouped, getattr(config, "attention_bias", None) is True)


KINDS = sorted({kind_of(name): name for name in reversed([*TINY, *FOREIGN])}.values())
"""The first tiny model of each kind."""


def _properties(name: str) -> set[tuple[object, ...]]:
    attentions, *others = kind_of(name)
    assert isinstance(attentions, tuple)
    return {("model", *each) for each in enumerate(others)} | {
        ("attention", *each) for one in attentions for each in enumerate(one)
    }


def _cover() -> list[str]:
    """Return few kinds that together have every property, the one with the most that are left first."""
    properties = {name: _properties(name) for name in KINDS}
    found, left = ["llama"], set[tuple[object, ...]]().union(*properties.values()) - properties["llama"]
    while left:
        found.append(max(KINDS, key=lambda name: len(properties[name] & left)))
        left -= properties[found[-1]]
    return sorted(found)


COVER = _cover()
"""Of kinds, few that have every property that any has: for laws of trainings, which take a second or more each."""
