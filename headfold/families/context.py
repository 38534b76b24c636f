"""The context length of a model, and the sliding windows of its layers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .wrapped import language_config

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions")
_RELATIVE_POSITIONS = frozenset({"t5", "mt5", "umt5", "longt5"})
_AFTER_PADDING = MappingProxyType(
    dict.fromkeys(
        (
            "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod", "longformer", "data2vec-text",
            "ibert", "luke", "esm", "layoutlmv3", "altclip_text_model", "bridgetower_text_model", "clap_text_model",
        ),
        1,
    )
    | {"lilt": 0, "markuplm": 0}
)  # fmt: skip
"""`model_type`s whose positions are numbered from `pad_token_id + 1` → the padding token where the config names none."""
_USUAL = MappingProxyType({"siglip": 64, "siglip_text_model": 64})
"""`model_type`s whose published configs leave the number out → what their class assumes."""
_FIRST_POSITION = MappingProxyType({"mpnet": 2})
"""`model_type`s whose first position is not 0, whatever the padding token."""
_SLIDING_BY_DEFAULT = ("mistral", "mixtral", "starcoder2", "phi3")
"""`model_type`s whose layers slide where the config has a window and does not say which layers have it."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a model of this config.json takes at once.

    An encoder-decoder has its decoder's, a wrapper around a `text_config` its text model's. None where positions are relative
    (T5) or the config names no limit.
    """
    if config.get("model_type") in _RELATIVE_POSITIONS:
        return None
    parts = (config, config.get("text_config") or {})
    named = ((part, part.get(field)) for field in _FIELDS for part in parts)
    found = next(((part, value) for part, value in named if isinstance(value, int) and value > 0), None)
    if found is None:
        return _USUAL.get(str(config.get("model_type")))
    holder, limit = found
    return None if holder.get("model_type") in _RELATIVE_POSITIONS else limit - _first_position(holder)


def sliding_window(config: Mapping[str, Any], layer: int) -> int | None:
    """Return the tokens that the attention of a layer looks back over; None where it looks back over all of them."""
    config = language_config(config)
    kinds = config.get("layer_types") or ()
    if kinds:
        slides = "sliding" in str(kinds[min(layer, len(kinds) - 1)])
    else:
        slides = config.get("use_sliding_window", config.get("model_type") in _SLIDING_BY_DEFAULT)
    window = config.get("sliding_window")
    return window if slides and window and window > 0 else None


def _first_position(config: Mapping[str, Any]) -> int:
    """Return the position of the first token; the rows of the table before it are never used."""
    model_type = str(config.get("model_type"))
    if model_type not in _AFTER_PADDING or config.get("position_embedding_type") == "rotary":  # ESM-2 has no table
        return _FIRST_POSITION.get(model_type, 0)
    padding = config.get("pad_token_id")
    return 1 + (_AFTER_PADDING[model_type] if padding is None else padding)
