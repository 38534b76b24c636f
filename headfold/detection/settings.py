"""Config settings that are off by default and would break the literal: each is enabled, and the freedoms are tested again."""

import re
from dataclasses import replace
from typing import Any

from ..core.equivalents import random_equivalent
from ..families.spec import Family
from .candidate import TOLERANCE, Candidate
from .toy import Architecture, ToyModel

_SUSPECT = re.compile(r"clip|qk_?(layer)?_?norm|alibi|gat(e|ing)$")
"""Names of settings that may change Q, K or V before the attention, or the heads after it."""
CLIP = 0.3
"""Well within the range of a toy model's K and V."""


def refusals(architecture: Architecture, family: Family) -> dict[str, str]:
    """Return setting → why the family is refused if it is enabled."""
    off = [name for name, value in architecture.config.items() if _SUSPECT.search(name) and value in (None, False)]
    return {
        name: "when it is on, transformations of K or V that its family allows change the logits"
        for name in off
        if _breaks(architecture, family, {name: CLIP if "clip" in name else True})
    }


def _breaks(architecture: Architecture, family: Family, overrides: dict[str, Any]) -> bool:
    try:
        candidate = Candidate.of(
            ToyModel.of(replace(architecture, overrides={**(architecture.overrides or {}), **overrides})), family
        )
        return candidate.logit_change(random_equivalent) > TOLERANCE
    except Exception:  # a setting that does not build alone says nothing of the literal
        return False
