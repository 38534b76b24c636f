"""From the attention that was found to a family literal, and from a literal to its source."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ..families.spec import Attention, Family, FusedRows, Rope
from .find import FoundAttention
from .toy import Architecture, ToyModel, Unproven

_ROLES = ("q", "k", "v", "qkv", "o", "q_norm", "k_norm", "sinks")


def attention_of(found: FoundAttention, toy_model: ToyModel, fused: FusedRows = "segments") -> Attention:
    """Return the entry of the literal: names on disk, and those in the model where they differ."""
    disk = {role: _stored(found, toy_model, role) for role in _ROLES if role in found.names}
    at = os.path.commonprefix([path.split(".")[:-1] for path in disk.values()])
    local: dict[str, Any] = {role: ".".join(path.split(".")[len(at) :]) for role, path in disk.items()}
    stored_at = ".".join("{layer}" if part == "0" else part for part in at)
    if stored_at.count("{layer}") != 1:
        raise Unproven(f"{'.'.join(at)} contains the projections on disk; expected it in one stack of layers")
    elsewhere: dict[str, Any] = {}
    if stored_at != found.at or any(local[role] != found.names[role] for role in local):
        renamed = {role: name for role, name in found.names.items() if name != local[role]}
        elsewhere = {"model_at": found.at, "model_names": renamed}
    numbers: dict[str, Any] = {role: name for role, name in found.fields.items() if name}
    numbers["kv_heads"] = numbers.get("kv_heads", "") if found.stock_gqa else ""
    return Attention(
        any_head_dim=False,  # only what was tried is claimed
        fixed_head_dim=True,
        name="layers.{layer}.self",
        at=stored_at,
        **local,
        fused=fused,
        core=found.core,
        transposed=found.transposed,
        **elsewhere,
        **numbers,
    )


def _stored(found: FoundAttention, toy_model: ToyModel, role: str) -> str:
    suffix = "" if role == "sinks" else ".weight"
    return toy_model.on_disk(f"{found.path(role, 0)}{suffix}").removesuffix(suffix)


def defaults_of(architecture: Architecture, attention: Attention, rope: Rope | None) -> dict[str, Any]:
    """Return what the class assumes for fields that a config may leave out, unless it derives them from other fields.

    A default that changes with other fields is not a constant, so it is left out.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[architecture.model_type]
    assumed = config_class().to_dict()
    counts = [name for name in (attention.kv_heads, attention.head_dim) if isinstance(assumed.get(name), int)]
    try:
        moved = config_class(**{attention.heads: 2 * assumed[attention.heads]}).to_dict()
    except Exception:  # a class may refuse a size that does not fit its other defaults
        moved = {}
    fixed = {name: assumed[name] for name in counts if moved.get(name) == assumed[name]}
    if rope is None or not rope.fraction:
        return fixed
    share = {**assumed, **(assumed.get("rope_parameters") or {})}.get(rope.fraction)
    return fixed | ({rope.fraction: share} if share and share != 1 else {})


def source_of(family: Family, summary: str) -> str:
    """Return the literal as a file of `headfold/families/`."""
    return f'"""{summary}"""\n\nfrom .spec import Attention, Family{", Rope" if family.position else ""}\n\nFAMILY = {_source(family)}\n'


def _source(value: Any, indent: int = 0) -> str:
    """Return a literal without its defaults, one field per line."""
    if not hasattr(value, "__dataclass_fields__"):
        return _source_of_value(value, indent)
    given = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != _default(f)]
    if not given or all(isinstance(item, bool | str) for _, item in given) and len(given) < 3:
        return f"{type(value).__name__}({', '.join(f'{name}={_source_of_value(item, 0)}' for name, item in given)})"
    inner = " " * (indent + 4)
    lines = [f"{inner}{name}={_source(item, indent + 4)}," for name, item in given]
    return "\n".join([f"{type(value).__name__}(", *lines, f"{' ' * indent})"])


def _default(field: Any) -> Any:
    return (
        field.default
        if field.default is not MISSING
        else field.default_factory()
        if field.default_factory is not MISSING
        else MISSING
    )


def _source_of_value(value: Any, indent: int) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_source_of_value(k, 0)}: {_source_of_value(v, 0)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple) and value and hasattr(value[0], "__dataclass_fields__"):
        inner = " " * (indent + 4)
        return "(\n" + "".join(f"{inner}{_source(item, indent + 4)},\n" for item in value) + " " * indent + ")"
    if isinstance(value, tuple):
        return "(" + ", ".join(_source_of_value(item, 0) for item in value) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
