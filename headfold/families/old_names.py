"""Rotary fields of a config under the names that readers knew before transformers 5.

transformers 5 writes one `rope_parameters`. Readers that know only `rope_theta` and `rope_scaling` (transformers 4, and engines with code
of their own) take their defaults instead and compute something else without an error, so a fold has both.
"""

from collections.abc import Mapping
from typing import Any

ROTARY_NAMES = ("rope_parameters", "rope_scaling")
"""Where a config may say what its table of frequencies is; the second is read first where both are there."""
_OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""What model types called them, where not `rope_theta` and `partial_rotary_factor`."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its rotary parameters under their old names too. Fields that are there stay as they are."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return dict(config)
    local = {}
    if isinstance(rope.get(_FULL), Mapping) and isinstance(rope.get(_SLIDING), Mapping):
        local = {"rope_local_base_freq": rope[_SLIDING].get("rope_theta")}
        rope = rope[_FULL]
    if any(isinstance(value, Mapping) for value in rope.values()):
        return dict(config)
    own = _OTHER_NAMES.get(str(config.get("model_type")), {})
    found = local | {own.get(name, name): rope.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        table = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        found["rope_scaling"] = {**table, "rope_type": kind, "type": kind}
    present = {name for name, value in config.items() if value is not None}
    return {**config, **{n: v for n, v in found.items() if v is not None and n not in present}}
