"""How a sentence encoder makes one vector of those of its tokens, as far as llama.cpp does the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.modules import MODULES, read_modules, read_pooling
from ..core.errors import UserError

POOLINGS: Mapping[str, str] = {"mean": "MEAN", "cls": "CLS"}
"""What sentence-transformers calls a pooling → what gguf calls it."""
_INSTEAD = "use headfold export --layout onnx"
_OLD = {"cls_token": "cls", "mean_tokens": "mean"}


def pooling_of(directory: Path) -> str | None:
    """Return the pooling of a sentence-transformers directory as gguf calls it, None where there is no such directory.

    Raises:
        UserError: llama.cpp has no such pooling, or nothing that does what comes after it.
    """
    if not (directory / MODULES).is_file():
        return None
    kinds = {module.kind: module.directory for module in read_modules(directory)}
    others = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if others or "Pooling" not in kinds:
        got = ", ".join(kinds) or "nothing"
        raise UserError(f"{directory}/modules.json: expected a transformer and its pooling, got {got}; {_INSTEAD}")
    named = _named(read_pooling(directory / kinds["Pooling"] / "config.json"))
    if len(named) != 1 or named[0] not in POOLINGS:
        got = " and ".join(named) or "none"
        raise UserError(
            f"{directory}: expected a pooling among {', '.join(POOLINGS)} for llama.cpp, got {got}; {_INSTEAD}"
        )
    return POOLINGS[named[0]]


def _named(config: Mapping[str, Any]) -> list[str]:
    """Return the poolings that a config names, one field each in its older form."""
    named = config.get("pooling_mode")
    if named is not None:
        return [named] if isinstance(named, str) else list(named)
    prefix = "pooling_mode_"
    set_ = [field.removeprefix(prefix) for field, value in config.items() if field.startswith(prefix) and value]
    return [_OLD.get(name, name) for name in set_]
