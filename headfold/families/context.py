"""The context length of a model."""

from collections.abc import Mapping
from typing import Any

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions")
_RELATIVE_POSITIONS = frozenset({"t5", "mt5", "umt5", "longt5"})
_PADDING_BEFORE_POSITIONS = ("roberta", "camembert")
"""Parts of the `model_type` of models whose positions are numbered from `pad_token_id + 1`."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a model of this config.json takes at once.

    An encoder-decoder has its decoder's, a wrapper around a `text_config` its text model's. None where positions are relative
    (T5) or the config names no limit.
    """
    model_type = str(config.get("model_type", ""))
    if model_type in _RELATIVE_POSITIONS:
        return None
    nested = config.get("text_config") or {}
    named = (part.get(field) for field in _FIELDS for part in (config, nested))
    limit = next((value for value in named if isinstance(value, int) and value > 0), None)
    if limit is None:
        return None
    if any(part in model_type for part in _PADDING_BEFORE_POSITIONS):
        padding = config.get("pad_token_id")
        return limit - (1 if padding is None else padding) - 1
    return limit
