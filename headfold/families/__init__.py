"""Floor 3: one literal per model family. The folder is the registry: a new file here is a new family."""

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from typing import Any

from ..checkpoint.refusals import TRUST, why_remote_code
from ..core.errors import UserError, suggest
from .spec import Family, read_field
from .wrapped import TEXT, WRAPPERS, attention_type, check_wrapper, is_wrapper, language_config

_NOT_FAMILIES = {"arithmetic", "cached", "context", "folded", "layout", "old_names", "spec", "wrapped"}


@cache
def all_families() -> dict[str, Family]:
    """Return every family by its file name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_FAMILIES)
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def is_known(model_type: Any) -> bool:
    """Return whether this `model_type` is a wrapper's, or a literal lists it, even if only to refuse it."""
    return model_type in WRAPPERS or any(model_type in family.model_types for family in all_families().values())


def family_of(config: dict[str, Any], where: str = "config.json", advice: str = TRUST) -> Family:
    """Return the family of a checkpoint, by the `model_type` of its config; of a wrapper that of its language model. `advice` is what to
    do about one that brings code.

    Raises:
        UserError: unknown `model_type`, of a wrapper or in it; a setting that cannot be folded exactly.
    """
    known = {alias: family for family in all_families().values() for alias in family.model_types}
    check_wrapper(config, where)
    language, model_type = language_config(config), attention_type(config)
    if not isinstance(model_type, str) or model_type not in known:
        raise UserError(f"{where}: {_why_unknown(config, known, advice)}")
    family = known[model_type]
    if is_wrapper(config) and not all(attention.kv_heads for attention in family.attentions):
        raise UserError(
            f"{where}: {TEXT}: expected a language model whose class reads a count of K/V heads, got {model_type!r}; "
            "save that model on its own and fold it"
        )
    for setting, reason in family.refuses.items():
        value = setting == "*" or read_field(family, language, setting)
        if value:
            what = model_type if setting == "*" else f"{model_type} with {setting}={value!r}"
            raise UserError(f"{where}: {what} cannot be folded exactly: {reason}")
    return family


def _why_unknown(config: dict[str, Any], known: Iterable[str], advice: str) -> str:
    """Return what is wrong with a config whose `model_type` no family lists, and what to do about it."""
    model_type = config.get("model_type")
    if model_type is None:
        return "has no model_type; expected the config.json that transformers writes beside a model's weights"
    if isinstance(config.get(TEXT), dict):
        inner = attention_type(config) if is_wrapper(config) else config[TEXT].get("model_type")
        expected = (
            f"; {suggest(str(inner), known)}" if is_wrapper(config) else f", and is none of {', '.join(WRAPPERS)}"
        )
        return (
            f"model_type {model_type!r:.60} wraps a {inner!r:.60} text model{expected}; "
            "save the text model on its own (model.language_model.save_pretrained) and fold that"
        )
    if config.get("auto_map"):
        return why_remote_code(config, advice)
    return f"unknown model_type {model_type!r:.60}; {suggest(str(model_type), known)}"
