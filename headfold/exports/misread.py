"""Which readers take a checkpoint for another one without an error, and what to use instead, found by running them."""

from collections.abc import Mapping
from typing import Any

from ..families.old_names import ROTARY_NAMES
from .gguf_model import MODEL_TYPES


def misread_by(config: Mapping[str, Any]) -> str:
    """Return a sentence on the readers that misread a checkpoint with this config; empty where none is known."""
    table: Mapping[str, Any] = next(
        (config[name] for name in reversed(ROTARY_NAMES) if isinstance(config.get(name), Mapping)), {}
    )
    if "headfold" in config or "short_factor" not in table or table["short_factor"] != table.get("long_factor"):
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
