"""Settings of a config that are off by default and would break the literal: each is switched on, and the freedoms tried."""

import re
from dataclasses import replace
from typing import Any

from ..core.equivalents import random_equivalent
from ..families.spec import Family
from .candidate import UNSEEN, Specimen
from .toy import Subject

_SUSPECT = re.compile(r"clip|qk_?(layer)?_?norm|alibi|gat(e|ing)$")
"""What touches Q, K or V between their projections and the attention, or the heads after it."""
CLIP = 0.3
"""Well within the spread of a toy model's K and V."""


def refusals(subject: Subject, family: Family) -> dict[str, str]:
    """Setting → why the family is refused where it is on."""
    off = [name for name, value in subject.config.items() if _SUSPECT.search(name) and value in (None, False)]
    return {
        name: "with it on, a model shows changes of K or V that it hides with it off"
        for name in off
        if _breaks(subject, family, {name: CLIP if "clip" in name else True})
    }


def _breaks(subject: Subject, family: Family, overrides: dict[str, Any]) -> bool:
    try:
        trial = Specimen.of(replace(subject, overrides={**(subject.overrides or {}), **overrides})).under(family)
        return trial.shows(random_equivalent) > UNSEEN
    except Exception:  # a setting that does not build alone says nothing of the literal
        return False
