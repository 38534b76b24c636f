"""Which readers take a checkpoint for another one without an error, and what to use instead, found by running them.

The versions are those of the tables in docs/how-to/serve.md, which `benchmarks/engines.py` measures.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..families.old_names import ROTARY_NAMES
from .gguf_architectures import ARCHITECTURES

_GENAI = "onnxruntime-genai's model builder (headfold check names the script that builds it rightly)"


def misread_by(config: Mapping[str, Any]) -> str:
    """Return a sentence on the readers that misread a checkpoint with this config; empty where none is known."""
    return "" if "headfold" in config else "; ".join(filter(None, (warning(config) for warning in _WARNINGS)))


def _tables(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what the config says of rotary frequencies: one table, or those of the types of layers."""
    found = [config[name] for name in ROTARY_NAMES if isinstance(config.get(name), Mapping)]
    return [*found, *(own for table in found for own in table.values() if isinstance(own, Mapping))]


def _factors(config: Mapping[str, Any]) -> str:
    if not any(
        "short_factor" in table and table["short_factor"] == table.get("long_factor") for table in _tables(config)
    ):
        return ""
    instead = (
        "headfold export --layout gguf writes them"
        if (found := ARCHITECTURES.get(str(config.get("model_type")))) and found.tables and found.any_head_dim
        else "use vLLM or transformers"
    )
    return (
        "the rotary factors of heads with a larger head_dim are ignored, without an error, by llama.cpp's converter (convert_hf_to_gguf; "
        f"{instead}) and by {_GENAI}"
    )


def _frequencies(config: Mapping[str, Any]) -> str:
    kinds = {table.get("rope_type") or table.get("type") for table in _tables(config)}
    found = [
        f"rotary frequencies of type {kind} are ignored, without an error, by {_GENAI}"
        for kind in ("linear", "yarn")
        if kind in kinds
    ]
    if "yarn" in kinds:
        found += [
            "the attention factor of yarn is ignored, without an error, by mistral.rs in a GGUF file (use llama.cpp)"
        ]
    if "llama3" in kinds:
        found += [
            "rotary frequencies of type llama3 differ slightly, without an error, in what CTranslate2's own converter writes (headfold "
            "export --layout ct2 writes them as they are)"
        ]
    return "; ".join(found)


def _query_heads(config: Mapping[str, Any]) -> str:
    layers = config.get("per_layer_config")
    if not isinstance(layers, Mapping):
        return ""
    names = ("num_key_value_heads", "num_attention_heads")
    numbers = range(config.get("num_hidden_layers") or 0)
    listed = [{**config, **(layers.get(str(layer)) or {})} for layer in numbers]
    shapes = {tuple(own.get(name) for name in names) for own in listed}
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


_WARNINGS: tuple[Callable[[Mapping[str, Any]], str], ...] = (_factors, _frequencies, _query_heads, _biases, _norms)
