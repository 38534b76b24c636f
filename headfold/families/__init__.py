"""Floor 3: one literal per model family. The folder is the registry: a new file here is a new family."""

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from typing import Any

from ..core.errors import UserError, suggest
from .spec import Family, read_field

_NOT_FAMILIES = {"arithmetic", "cached", "context", "folded", "layout", "old_names", "spec"}


@cache
def all_families() -> dict[str, Family]:
    """Return every family by its file name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_FAMILIES)
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def is_known(model_type: Any) -> bool:
    """Return whether a literal lists this `model_type`, even if only to refuse it."""
    return any(model_type in family.model_types for family in all_families().values())


def family_of(config: dict[str, Any], where: str = "config.json") -> Family:
    """Return the family of a checkpoint, by the `model_type` of its config.

    Raises:
        UserError: unknown `model_type`; a wrapper around a `text_config`; a setting that cannot be folded exactly.
    """
    known = {alias: family for family in all_families().values() for alias in family.model_types}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise UserError(f"{where}: {_why_unknown(config, known)}")
    family = known[model_type]
    for setting, reason in family.refuses.items():
        value = setting == "*" or read_field(family, config, setting)
        if value:
            what = model_type if setting == "*" else f"{model_type} with {setting}={value!r}"
            raise UserError(f"{where}: {what} cannot be folded exactly: {reason}")
    return family


def _why_unknown(config: dict[str, Any], known: Iterable[str]) -> str:
    """Return what is wrong with a config whose `model_type` no family lists, and what to do about it."""
    model_type = config.get("model_type")
    if model_type is None:
        return "has no model_type; expected the config.json that transformers writes beside a model's weights"
    if isinstance(config.get("text_config"), dict):
        inner = config["text_config"].get("model_type")
        return (
            f"model_type {model_type!r} wraps a {inner!r} text model; "
            "save the text model on its own (model.language_model.save_pretrained) and fold that"
        )
    if config.get("auto_map"):
        return (
            f"model_type {model_type!r:.60} runs its own code (auto_map), which headfold does not support; "
            f"if its attention is that of a known family, convert it to that; {suggest(str(model_type), known)}"
        )
    return f"unknown model_type {model_type!r:.60}; {suggest(str(model_type), known)}"
