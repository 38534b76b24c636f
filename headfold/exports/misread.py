"""Which readers take a checkpoint for another one without an error, and what to use instead, found by running them.

The versions are those of the tables in docs/how-to/serve.md, which `benchmarks/engines.py` measures.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..families.old_names import ROTARY_NAMES
from .gguf_model import MODEL_TYPES

_GENAI = "onnxruntime-genai's model builder (headfold check names the script that builds it rightly)"


def misread_by(config: Mapping[str, Any]) -> str:
    """Return a sentence on the readers that misread a checkpoint with this config; empty where none is known."""
    return "" if "headfold" in config else "; ".join(filter(None, (say(config) for say in _SAYINGS)))


def _table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the config says of rotary frequencies."""
    return next((config[name] for name in reversed(ROTARY_NAMES) if isinstance(config.get(name), Mapping)), {})


def _factors(config: Mapping[str, Any]) -> str:
    table = _table(config)
    if "short_factor" not in table or table["short_factor"] != table.get("long_factor"):
        return ""
    instead = (
        "headfold export --layout gguf writes them"
        if config.get("model_type") in MODEL_TYPES
        else "use vLLM or transformers"
    )
    return (
        "the rotary factors of heads with a larger head_dim are ignored, without an error, by llama.cpp's converter (convert_hf_to_gguf; "
        f"{instead}) and by {_GENAI}"
    )


def _frequencies(config: Mapping[str, Any]) -> str:
    found, kind = [], _table(config).get("rope_type")
    if kind in ("linear", "yarn"):
        found = [f"rotary frequencies of type {kind} are ignored, without an error, by {_GENAI}"]
    if kind == "yarn":
        found += [
            "the attention factor of yarn is ignored, without an error, by mistral.rs in a GGUF file (use llama.cpp)"
        ]
    if kind == "llama3":
        found = [
            "rotary frequencies of type llama3 differ slightly, without an error, in what CTranslate2's own converter writes (headfold "
            "export --layout ct2 writes them as they are)"
        ]
    return "; ".join(found)


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


def _biases(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    biased = {
        "llama": bool(config.get("attention_bias") or config.get("mlp_bias")),
        "phi": True,  # of the output embedding
    }.get(str(kind), False)
    return (
        f"biases are ignored, without an error, by mistral.rs as it reads a checkpoint of {kind} (it reads them in what headfold export "
        "--layout gguf writes)"
        if biased
        else ""
    )


def _norms(config: Mapping[str, Any]) -> str:
    if config.get("model_type") != "olmo":
        return ""
    return f"LayerNorm is computed as RMSNorm, without an error, by {_GENAI}"


_SAYINGS: tuple[Callable[[Mapping[str, Any]], str], ...] = (_factors, _frequencies, _query_heads, _biases, _norms)
