"""A count of K/V heads per layer, as transformers' `per_layer_config`; the class that builds such layers lies beside the weights."""

from collections import Counter
from pathlib import Path
from typing import Any

from ..checkpoint.reader import Checkpoint
from . import padding
from .folded import Entry, Folded, without_code
from .pieces import Export

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
CODE = Path(__file__).parents[1] / "runtime" / "modeling_per_layer.py"


def why_not(source: Folded) -> str | None:
    """Why this model gets no per-layer config, None where it does."""
    if source.model_type not in MODEL_TYPES:
        return f"{source.model_type} has no per-layer class, expected one of {', '.join(MODEL_TYPES)}"
    if len({entry.head_dim for entry in source.entries}) > 1:
        return "heads of different widths in different layers have no class: they would turn by different angles"
    if source.is_uniform and source.is_even:
        return "expected counts of K/V heads that differ between layers, got the same everywhere; use --layout native"
    if not _keeps_heads(source):
        return padding.why_not(source)
    return None


def _keeps_heads(source: Folded) -> bool:
    """Whether every layer has the source's count of query heads, so that the source's own class can have them."""
    return all(entry.width * entry.groups.num_kv_heads == entry.num_heads for entry in source.entries)


def per_layer(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """Every layer with its own count; unequal groups inside a layer are filled up to the largest of that layer."""
    shapes = [_shape(entry) for entry in source.entries]
    usual = dict(Counter(tuple(shape.items()) for shape in shapes).most_common(1)[0][0])
    heads = {shape["num_attention_heads"] for shape in shapes}
    base = without_code(source.config) if _keeps_heads(source) else padding.padded_config(source, heads)
    stem = base["architectures"][0].removesuffix("ForCausalLM")
    names = {auto: f"PerLayer{stem}{task}" for auto, task in _AUTOS.items()}
    config = {
        **base,
        **usual,
        "architectures": [names["AutoModelForCausalLM"]],
        "head_dim": source.entries[0].head_dim,
        "per_layer_config": {
            str(layer): {name: value for name, value in shape.items() if value != usual[name]}
            for layer, shape in enumerate(shapes)
            if shape != usual
        },
        "auto_map": {auto: f"{CODE.stem}.{name}" for auto, name in names.items()},
    }
    pieces = [piece for entry in source.entries for piece in padding.reordered(checkpoint, entry, entry.width)]
    counts = ", ".join(map(str, source.counts))
    said = f"per_layer_config with {counts} K/V heads: loads in transformers with trust_remote_code=True"
    return Export(layout, config, pieces, said, {CODE.name: CODE.read_text()})


_AUTOS = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}


def _shape(entry: Entry) -> dict[str, Any]:
    num_kv_heads = entry.groups.num_kv_heads
    return {"num_attention_heads": entry.width * num_kv_heads, "num_key_value_heads": num_kv_heads}
