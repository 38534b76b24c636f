"""A number of K/V heads per layer, in transformers' `per_layer_config`; the class that builds such layers is saved beside the weights."""

from collections import Counter
from pathlib import Path
from typing import Any

from ...checkpoint.reader import Checkpoint
from .. import llama_like
from ..folded import Entry, Folded, without_code
from ..layout import ExportLayout
from ..pieces import Export

CODE = Path(__file__).parents[2] / "runtime" / "modeling_per_layer.py"


_AUTOS = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}


def why_not(source: Folded) -> str | None:
    """Return why the model gets no config per layer."""
    if len({entry.head_dim for entry in source.entries}) > 1:
        return "no class has layers with different head_dims, as their rotary angles would differ"
    if source.is_uniform and source.is_even:
        return "expected numbers of K/V heads that differ between layers, got the same everywhere"
    return None if _keeps_heads(source) else llama_like.why_not(source)


def _keeps_heads(source: Folded) -> bool:
    """Return whether every layer keeps the source's number of query heads, so that the source's own class can build it."""
    return all(entry.group_size * entry.groups.num_kv_heads == entry.num_heads for entry in source.entries)


def export(checkpoint: Checkpoint, source: Folded) -> Export:
    """Return a config with the number of heads of each layer; smaller groups are filled up to the largest of their layer."""
    shapes = [_shape(entry) for entry in source.entries]
    usual = dict(Counter(tuple(shape.items()) for shape in shapes).most_common(1)[0][0])
    heads = {shape["num_attention_heads"] for shape in shapes}
    base = without_code(source.config) if _keeps_heads(source) else llama_like.padded_config(source, heads)
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
    pieces = [piece for entry in source.entries for piece in llama_like.reordered(checkpoint, entry, entry.group_size)]
    counts = ", ".join(map(str, source.counts))
    description = f"per_layer_config with {counts} K/V heads: loads in transformers with trust_remote_code=True"
    return Export(LAYOUT.name, config, pieces, description, {CODE.name: CODE.read_text()})


def _shape(entry: Entry) -> dict[str, Any]:
    num_kv_heads = entry.groups.num_kv_heads
    return {"num_attention_heads": entry.group_size * num_kv_heads, "num_key_value_heads": num_kv_heads}


LAYOUT = ExportLayout(
    name="per-layer",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    why_not=why_not,
    export=export,
    needs_one_count=False,
    needs_equal_groups=False,
    pads_groups_to="layer",
    priority=2,
)
