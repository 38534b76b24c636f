"""Llama's relatives with one count of K/V heads: queries in standard order, small groups filled up with zero heads.

A zero query attends evenly, and its zero columns of `W_o` drop what it found: exact, at the cost of its weights and no K/V.
Then heads times their width is no longer the model's, so the class must read `head_dim`, and an engine must too: Llama refuses
a model width that its heads do not divide, Qwen 2 is read without `head_dim` by engines. Mistral and Seed-OSS compute the same.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoint.reader import Checkpoint
from .folded import Entry, Folded, stock_config, without_code
from .pieces import Export, Linear, Piece

READ_HEAD_DIM = ("mistral", "qwen3", "seed_oss")
"""Model types whose class takes any number of heads of any width; so does llama where its heads divide the model's width."""
MODEL_TYPES = ("llama", "qwen2", *READ_HEAD_DIM)
_NAMES = {"mistral": "Mistral", "seed_oss": "SeedOss"}
_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "rope_parameters", "attention_dropout",
)  # fmt: skip
"""Fields that mean the same in all of these classes."""


def why_not(source: Folded) -> str | None:
    """Why this model cannot be padded, None where it can."""
    if source.model_type == "qwen2" and source.has_window:
        return "qwen2 with a sliding window has no stock class that reads any head_dim"
    return None


def in_standard_order(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """Equal groups: the same class, query heads sorted by the K/V head they read."""
    entry = source.entries[0]
    config = {**without_code(source.config), "num_key_value_heads": entry.groups.num_kv_heads}
    pieces = [piece for entry in source.entries for piece in reordered(checkpoint, entry, entry.group_size)]
    return Export(layout, config, pieces, f"{config['architectures'][0]}: loads in stock transformers")


def padded(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """Unequal groups, each filled up to the largest of all layers."""
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
    """The rows of Q and the columns of O in slots; nothing where they lie so already."""
    slots = entry.slots(group_size)
    if slots == tuple(range(entry.num_heads)):
        return
    query, output = entry.names["q"], entry.names["o"]
    yield Linear(query, query, rows=slots, block=entry.head_dim).piece(checkpoint)
    yield Linear(output, output, columns=slots, block=entry.head_dim).piece(checkpoint)


def padded_config(source: Folded, num_heads: Collection[int]) -> dict[str, Any]:
    """The config of a class that takes these counts of query heads, all of them in one model, but for the heads."""
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
    return {**named, **common, "rope_theta": stock.rope_parameters["rope_theta"], **own, **kept}
