"""Find the config field that sets how much of a head rotates, by changing it and testing whether the freedom follows."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..families.spec import Attention, Family, Rope
from .candidate import Candidate
from .freedom import KeyPosition, holds
from .shrink import Config
from .toy import Architecture, ToyModel, Unproven

_CALLED = re.compile(r"partial_rotary|rotary_(pct|percent|dim|ndims|emb_dim|fraction)|rope_(dim|fraction|percent)")


def rope_of(
    architecture: Architecture, attention: Attention, where: KeyPosition, head_dim: int, layers: str | None
) -> Rope | None:
    """Return the literal's position: layout, layers and, if only a part of the head may rotate, the field that sets it.

    Raises:
        Unproven: a part of the head rotates, and no field of the config changes it.
    """
    if where.freedom.kind == "any":
        return None
    rope = Rope(interleaved=where.freedom.interleaved, layers=layers)
    for field, overrides, rotary_dim in _candidate_fields(
        architecture.toy_config().to_dict(), head_dim, where.freedom.rotary_dim
    ):
        if _moves_rotary_dim(architecture, attention, where, overrides, rotary_dim):
            return replace(rope, **field)
    if where.freedom.rotary_dim != head_dim:
        raise Unproven(
            f"{where.freedom.rotary_dim} of {head_dim} dims of a head rotate, but no config field was found that sets this number"
        )
    return rope


def _candidate_fields(
    config: Config, head_dim: int, rotary_dim: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """Yield a field of the literal, a config that changes its value, and how many dims should rotate then."""
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


def _moves_rotary_dim(
    architecture: Architecture, attention: Attention, where: KeyPosition, overrides: Mapping[str, Any], dim: int
) -> bool:
    """Return whether the freedom of K follows the changed config."""
    family = Family(model_types=(architecture.model_type,), attentions=(attention,))
    try:
        candidate = Candidate.of(
            ToyModel.of(replace(architecture, overrides={**(architecture.overrides or {}), **overrides})), family
        )
        placed = [i for i in range(len(candidate.sites)) if i not in where.without]
        new = replace(where.freedom, rotary_dim=dim)
        # Of neighbouring dims a claim on more dims is the weaker one, and holds too: one on fewer must not.
        wrong = replace(new, rotary_dim=dim - 2) if new.interleaved else where.freedom
        return all(holds(candidate, i, new) and not holds(candidate, i, wrong) for i in placed)
    except Exception:  # a field that the class does not know may break it in any way; then it is not the one
        return False
