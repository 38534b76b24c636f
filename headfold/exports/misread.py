"""Which readers take a checkpoint for another one without an error, and what to use instead, found by running them."""

from collections.abc import Mapping
from typing import Any

from ..families.old_names import ROTARY_NAMES
from .gguf_model import MODEL_TYPES


def misread_by(config: Mapping[str, Any]) -> str:
    """Return a sentence on the readers that misread a checkpoint with this config; empty where none is known."""
    return "" if "headfold" in config else "; ".join(filter(None, (_factors(config), _query_heads(config))))


def _factors(config: Mapping[str, Any]) -> str:
    table: Mapping[str, Any] = next(
        (config[name] for name in reversed(ROTARY_NAMES) if isinstance(config.get(name), Mapping)), {}
    )
    if "short_factor" not in table or table["short_factor"] != table.get("long_factor"):
        return ""
    instead = (
        "headfold export --layout gguf writes them"
        if config.get("model_type") in MODEL_TYPES
        else "use vLLM or transformers"
    )
    return (
        "the rotary factors of heads with a larger head_dim are ignored, without an error, by llama.cpp's converter (convert_hf_to_gguf; "
        f"{instead}) and by onnxruntime-genai's model builder (headfold check names the script that builds them)"
    )


def _query_heads(config: Mapping[str, Any]) -> str:
    layers = config.get("per_layer_config")
    if not isinstance(layers, Mapping):
        return ""
    names = ("num_key_value_heads", "num_attention_heads")
    shapes = {tuple({**config, **own}[name] for name in names) for own in ({}, *layers.values())}
    if len(shapes) == len({num_kv_heads for num_kv_heads, _ in shapes}):
        return ""
    return (
        "paged attention of OpenVINO GenAI on a CPU computes something else, without an error, where layers with the same number of K/V "
        'heads differ in their query heads (open it with ATTENTION_BACKEND="SDPA")'
    )
