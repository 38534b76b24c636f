"""Models of Llama's kind with one number of K/V heads: queries in standard order, smaller groups filled up with zero heads.

A zero query attends evenly, and its zero columns of `W_o` drop the result: this is exact, and costs weights but no K/V cache. The number
of heads times head_dim is then no longer the hidden size, so the class must read `head_dim`, and an engine too: Llama refuses a hidden
size that its heads do not divide, and engines read Qwen 2 without `head_dim`. Mistral and Seed-OSS compute the same function.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoint.reader import Checkpoint
from .folded import Entry, Folded, stock_config, without_code
from .pieces import Export, Linear, Piece

READ_HEAD_DIM = ("mistral", "qwen3", "seed_oss")
"""Model types whose class takes any number of heads and any head_dim; llama does so where its heads divide the hidden size."""
MODEL_TYPES = ("llama", "qwen2", *READ_HEAD_DIM)
_NAMES = {"mistral": "Mistral", "seed_oss": "SeedOss"}
_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "rope_parameters", "attention_dropout",
)  # fmt: skip
"""Fields that mean the same in all of these classes."""


def why_not(source: Folded) -> str | None:
    """Return why a model of these types cannot be padded, None where it can."""
    if source.model_type == "qwen2" and source.has_window:
        return "qwen2 with a sliding window has no stock class that reads any head_dim"
    return None


def in_standard_order(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """Return the same class with equal groups: query heads are sorted by the K/V head they read."""
    entry = source.entries[0]
    config = {**without_code(source.config), "num_key_value_heads": entry.groups.num_kv_heads}
    pieces = [piece for entry in source.entries for piece in reordered(checkpoint, entry, entry.group_size)]
    return Export(layout, config, pieces, f"{config['architectures'][0]}: loads in stock transformers")


def padded(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """Return a class that reads `head_dim`, with every group filled up to the largest of all layers."""
    group_size, num_kv_heads = source.group_size, source.counts[0]
    num_heads = group_size * num_kv_heads
    config = padded_config(source, [num_heads])
    shape = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    config |= shape | {"head_dim": source.entries[0].head_dim}
    pieces = [piece for entry in source.entries for piece in reordered(checkpoint, entry, group_size)]
    empty = num_heads - source.entries[0].num_heads
    description = (
        f"{config['architectures'][0]} with {empty} zero query heads in every layer: loads in stock transformers"
    )
    return Export(layout, config, pieces, description)


def reordered(checkpoint: Checkpoint, entry: Entry, group_size: int) -> Iterator[Piece]:
    """Yield the rows of Q and the columns of O in slots; nothing where they are in this order already."""
    slots = entry.slots(group_size)
    if slots == tuple(range(entry.num_heads)):
        return
    query, output = entry.names["q"], entry.names["o"]
    yield Linear(query, query, rows=slots, block=entry.head_dim).piece(checkpoint)
    yield Linear(output, output, columns=slots, block=entry.head_dim).piece(checkpoint)


def padded_config(source: Folded, num_heads: Collection[int]) -> dict[str, Any]:
    """Return the config, except its heads, of a class that takes these numbers of query heads in one model."""
    stock = stock_config(source)
    # Llama's config divides by the count before it knows that layers have counts of their own.
    divides = source.model_type == "llama" and len(num_heads) == 1 and stock.hidden_size % min(num_heads) == 0
    if divides or source.model_type in READ_HEAD_DIM:
        return without_code(source.config)
    biases = _biases(source.model_type, stock)
    if any(biases.values()):
        return _as_class("seed_oss", source, stock, {**biases, "residual_dropout": 0.0})
    return _as_class("mistral", source, stock, {"sliding_window": None})


def _biases(model_type: str, stock: Any) -> dict[str, bool]:
    if model_type == "qwen2":
        return {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
    bias = stock.attention_bias
    return {"attention_bias": bias, "attention_out_bias": bias, "mlp_bias": stock.mlp_bias}


def _as_class(model_type: str, source: Folded, stock: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    common = {name: getattr(stock, name) for name in _COMMON}
    kept = {name: source.config[name] for name in ("dtype", "torch_dtype") if name in source.config}
    named = {"architectures": [f"{_NAMES[model_type]}ForCausalLM"], "model_type": model_type}
    return {**named, **common, **own, **kept}
