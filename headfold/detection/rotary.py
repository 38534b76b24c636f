"""Which config field says how much of a head rotates: found by changing it and seeing whether the freedom follows."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..families.spec import Attention, Family, Rope
from .candidate import Specimen
from .freedom import Position, holds
from .shrink import Config
from .toy import Subject, Unproven

_CALLED = re.compile(r"partial_rotary|rotary_(pct|percent|dim|ndims|emb_dim|fraction)|rope_(dim|fraction|percent)")


def rope_of(subject: Subject, attention: Attention, where: Position, head_dim: int, layers: str | None) -> Rope | None:
    """The literal's position: layout, layers and, where a part of the head can rotate, the field that says how much.

    Raises:
        Unproven: a part of the head rotates, and no field of the config moves it.
    """
    if where.freedom.kind == "any":
        return None
    rope = Rope(interleaved=where.freedom.interleaved, layers=layers)
    for fields, overrides, rotary_dim in _settings(subject.toy_config().to_dict(), head_dim, where.freedom.rotary_dim):
        if _follows(subject, attention, where, overrides, rotary_dim):
            return replace(rope, **fields)
    if where.freedom.rotary_dim != head_dim:
        raise Unproven(
            f"{where.freedom.rotary_dim} of {head_dim} dims of a head rotate, and no config field was found that says so"
        )
    return rope


def _settings(config: Config, head_dim: int, rotary_dim: int) -> Iterator[tuple[dict[str, str], dict[str, Any], int]]:
    """The literal's field, the config that sets it otherwise, and what would rotate then."""
    share = 0.25 if rotary_dim == head_dim // 2 else 0.5
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()):
        name = "partial_rotary_factor"
        yield {"fraction": name}, {"rope_parameters": {**rope, name: share}}, int(head_dim * share)
    for name, value in config.items():
        if not _CALLED.search(name):
            continue
        if isinstance(value, float) and int(head_dim * value) == rotary_dim:
            yield {"fraction": name}, {name: share}, int(head_dim * share)
        if isinstance(value, int) and value == rotary_dim:
            yield {"dim": name}, {name: int(head_dim * share)}, int(head_dim * share)


def _follows(subject: Subject, attention: Attention, where: Position, overrides: Mapping[str, Any], dim: int) -> bool:
    family = Family(model_types=(subject.model_type,), attentions=(attention,))
    try:
        trial = Specimen.of(replace(subject, overrides={**(subject.overrides or {}), **overrides})).under(family)
        placed = [i for i in range(len(trial.sites)) if i not in where.without]
        new = replace(where.freedom, rotary_dim=dim)
        # Of neighbouring dims a claim on more dims is the weaker one, and holds too: one on fewer must not.
        wrong = replace(new, rotary_dim=dim - 2) if new.interleaved else where.freedom
        return all(holds(trial, i, new) and not holds(trial, i, wrong) for i in placed)
    except Exception:  # a field that the class does not know may break it in any way; then it is not the one
        return False
