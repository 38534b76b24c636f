"""A fold as llama.cpp reads it: the fields that describe it, and its tensors under other names, in another order and number type."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..llama_cpp.pooling import pooling_of
from ..llama_cpp.tokens import name_for
from ..rotary_tables import rotary_table
from .folded import Entry, Folded, stock_config
from .gguf_architectures import APPROXIMATED, ARCHITECTURES, Architecture, activation, architecture_why_not
from .pieces import picked

if TYPE_CHECKING:
    import gguf

MODEL_TYPES = tuple(ARCHITECTURES)
PURE = "q4_0-pure"
"""q4_0 for all matrices."""
NUMBER_TYPES = ("f32", "bf16", "f16", "q8_0", "q4_0", PURE)
OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""Number type that holds a dtype; f32 for others."""
_MORE_BITS = ("attn_k", "attn_v", "attn_qkv", "attn_k_b", "attn_v_b", "attn_output", "token_embd", "output")
"""Tensors that are q8_0 where the others are q4_0: embeddings as llama.cpp itself keeps them in more bits, the shared heads, and what
reads their values.
"""
_EXACT = ("position_embd", "token_types")
"""Tensors that llama.cpp itself never quantises."""
_SMALL = ("attn_kv_a_mqa",)
"""Tensors whose numbers are below those of float16, and of scales in float16: they are bf16 instead."""
_ESSENTIAL = {"attn_output.weight", "ffn_up.weight", "ffn_down.weight"}
"""Tensors that every layer of every architecture has."""
_OLD_SUFFIXES = {"gamma": "weight", "beta": "bias"}
"""What the last part of names was called in checkpoints of the first BERTs."""
_BUFFERS = ("inv_freq", "masked_bias", "position_ids", "token_type_ids")
"""Last parts of the names of what some checkpoints hold beside weights."""
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
_BLOCK = 32
"""Numbers that share a scale in q8_0 and q4_0: a row holds a whole number of such blocks, else it is f16."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file: `old` are the tensors of the checkpoint that it joins by rows, or `values` are its numbers.

    `rows` and `columns` pick heads of `head_dim`, `inside` reorders the dims of each head, as in `pieces.Linear`.
    """

    name: str
    shape: tuple[int, ...]
    number_type: str
    old: tuple[str, ...] = ()
    transposed: bool = False
    """Whether it is (in, out) in the checkpoint."""
    values: Tensor | None = None
    rows: Sequence[int] | None = None
    columns: Sequence[int] | None = None
    inside: Sequence[int] | None = None
    head_dim: int = 1
    offset: float = 0.0
    """What is added to every number."""
    part: Callable[[Tensor], Tensor] | None = None
    """Returns what the tensor has of the one in the checkpoint."""

    @property
    def kind(self) -> "gguf.GGMLQuantizationType":
        """The number type as the gguf package names it."""
        import gguf

        return gguf.GGMLQuantizationType[self.number_type.upper()]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size

    def announce(self, writer: "gguf.GGUFWriter") -> None:
        """List the tensor in the header."""
        writer.add_tensor_info(self.name, self.shape, np.dtype(np.float32), self.num_bytes, self.kind)

    def numbers(self, checkpoint: Checkpoint) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the numbers as the file holds them.

        Raises:
            UserError: one overflows float16.
        """
        import gguf

        tensor = torch.cat([checkpoint.read(name) for name in self.old]) if self.values is None else self.values
        tensor = tensor.mT if self.transposed else tensor
        tensor = tensor if self.part is None else self.part(tensor)
        tensor = picked(tensor, self.rows, self.head_dim, 0, self.inside)
        tensor = picked(tensor, self.columns, self.head_dim, 1)
        values = (tensor.float() + self.offset).contiguous().numpy()
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.old[0]}: expected finite numbers, got NaN or infinity; fold again from good weights"
            )
        if self.number_type == "f16" and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise UserError(
                f"{self.old[0]}: expected numbers that float16 holds, got {np.abs(values).max():g}; use bf16"
            )
        return gguf.quants.quantize(values, self.kind)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What is written of a fold: architecture, fields, tensors."""

    architecture: str
    number_type: str
    kind: Architecture
    stock: Any
    """The config as the source's class reads it."""
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    head_dim: int
    rotary_dim: int
    vocab_size: int
    attention_factor: float
    tensors: tuple[GgufTensor, ...]
    name: str
    pooling: str | None
    """What makes one vector of those of the tokens, as gguf calls it."""

    @property
    def heads(self) -> str:
        """The heads of the model in words."""
        query, key = (n[0] if len(set(n)) == 1 else n for n in (self.num_heads, self.num_kv_heads))
        heads = f"{query} query heads and {key} K/V heads of {self.head_dim}"
        left_out = (
            "without its head over words" if self.kind.encodes and self.stock.architectures != ["BertModel"] else ""
        )
        return "; ".join(filter(None, (heads, left_out, APPROXIMATED.get(activation(self.kind, self.stock), ""))))

    def add_fields(self, writer: "gguf.GGUFWriter") -> None:
        """Write what the architecture has of its own."""
        import gguf

        stock = self.stock
        writer.add_context_length(_context(stock))
        writer.add_embedding_length(stock.hidden_size)
        writer.add_block_count(stock.num_hidden_layers)
        # Arrays need all three: llama.cpp reads the counts of a layer together.
        arrays = self.architecture == self.kind.per_layer
        (mlp_size,) = (tensor.shape[-1] for tensor in self.tensors if tensor.name == "blk.0.ffn_down.weight")
        writer.add_feed_forward_length([mlp_size] * stock.num_hidden_layers if arrays else mlp_size)
        writer.add_head_count(list(self.num_heads) if arrays else self.num_heads[0])
        writer.add_head_count_kv(list(self.num_kv_heads) if arrays else self.num_kv_heads[0])
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        epsilon = writer.add_layer_norm_eps if self.kind.layer_norm else writer.add_layer_norm_rms_eps
        named = self.kind.epsilon
        epsilon(named if isinstance(named, float) else getattr(stock, named))
        for field, method in self.kind.scales.items():
            getattr(writer, method)(float(getattr(stock, field)))
        if self.kind.encodes:
            writer.add_causal_attention(False)
            writer.add_token_type_count(stock.type_vocab_size)
        if self.pooling:
            writer.add_pooling_type(gguf.PoolingType[self.pooling])
        if hasattr(stock, "use_parallel_residual"):
            writer.add_parallel_residual(stock.use_parallel_residual)
        if not self.rotary_dim:
            return
        writer.add_rope_dimension_count(self.rotary_dim)
        writer.add_rope_freq_base(float(stock.rope_parameters["rope_theta"]))
        if self.attention_factor != 1:
            writer.add_rope_scaling_attn_factors(self.attention_factor)


def model_why_not(checkpoint: Checkpoint, source: Folded) -> str | None:
    """Return why llama.cpp cannot compute what a fold of these types computes."""
    stock = stock_config(source)
    reason = architecture_why_not(source, stock)
    for number in (_context(stock), stock.num_hidden_layers, stock.hidden_size):
        if not isinstance(number, int) or number < 1:
            return f"expected context, layers and hidden size above 0, got {number}"
    if source.family.position:
        rotary_table(source.config, source.where)
        float(stock.rope_parameters["rope_theta"])
    kind = ARCHITECTURES[source.model_type]
    if kind.encodes:
        pooling_of(checkpoint.path)
        return reason
    if reason is None and not stock.tie_word_embeddings and _HEAD not in _named(checkpoint, source):
        reason = "expected an output embedding, as it is not tied, got none"
    return reason


def described(checkpoint: Checkpoint, source: Folded, number_type: str | None) -> GgufModel:
    """Return what is written of a fold, without reading a tensor but embeddings that may be tied."""
    kind, stock, entries = ARCHITECTURES[source.model_type], stock_config(source), source.entries
    sizes = [source.group_size if source.is_uniform else entry.group_size for entry in entries]
    frequencies, factor = rotary_table(source.config, source.where) if source.family.position else (torch.empty(0), 1.0)
    tensors = _tensors(checkpoint, source, sizes, stock, number_type)
    if number_type is None:
        number_type = OF_DTYPE.get(checkpoint.tensors[f"{entries[0].names['o']}.weight"].dtype, "f32")
    if len(frequencies) and stock.rope_parameters["rope_type"] != "default":
        factors = _frequency_factors(frequencies, float(stock.rope_parameters["rope_theta"]))
        tensors += [GgufTensor(f"{name}.weight", tuple(factors.shape), "f32", values=factors) for name in kind.tables]
    return GgufModel(
        architecture=_architecture(source),
        number_type=number_type,
        kind=kind,
        stock=stock,
        num_heads=tuple(count * size for count, size in zip(source.counts, sizes, strict=True)),
        num_kv_heads=source.counts,
        head_dim=entries[0].head_dim,
        rotary_dim=2 * len(frequencies),
        vocab_size=next(tensor.shape[0] for tensor in tensors if tensor.name == _EMBEDDING),
        attention_factor=factor,
        tensors=tuple(tensors),
        name=name_for(checkpoint.path),
        pooling=pooling_of(checkpoint.path) if kind.encodes else None,
    )


def _architecture(source: Folded) -> str:
    kind = ARCHITECTURES[source.model_type]
    return kind.name if source.is_uniform else kind.per_layer


def _context(stock: Any) -> Any:
    """Return the context length; a BLOOM has no limit but that it was trained with."""
    return getattr(stock, "max_position_embeddings", getattr(stock, "seq_length", 2048))


def _named(checkpoint: Checkpoint, source: Folded) -> dict[str, tuple[str, ...]]:
    """Return tensor of the architecture → tensors on disk: one, or those of q, k and v where the architecture joins them.

    Raises:
        UserError: the architecture has no place for a tensor.
    """
    import gguf

    architecture = _architecture(source)
    (key,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, len(source.entries))
    joined: dict[str, str] = {}
    if gguf.MODEL_TENSOR.ATTN_Q not in gguf.MODEL_TENSORS[key]:
        for layer, entry in enumerate(source.entries):
            joined |= {name: f"blk.{layer}.attn_qkv" for role in "qkv" if (name := entry.names.get(role))}
    # Masks that old checkpoints have beside the projections.
    buffers = {f"{entry.names['o'].rpartition('.')[0]}.bias" for entry in source.entries}
    found: dict[str, tuple[str, ...]] = {}
    for old in (*(f"{name}.{suffix}" for suffix in ("weight", "bias") for name in joined), *checkpoint.tensors):
        module, _, suffix = old.rpartition(".")
        suffix = _OLD_SUFFIXES.get(suffix, suffix)
        inner = old.removeprefix("transformer.").removeprefix("bert.")
        if suffix in _BUFFERS or old in buffers or old not in checkpoint.tensors:
            continue
        if inner.startswith(ARCHITECTURES[source.model_type].left_out):
            continue
        new = joined.get(module) or names.get_name(module) or names.get_name(inner.rpartition(".")[0])
        if new is None or suffix not in ("weight", "bias"):
            raise UserError(f"{source.where}: layout gguf: {old}: llama.cpp's {architecture} has no such tensor")
        olds = found.get(f"{new}.{suffix}", ())
        found[f"{new}.{suffix}"] = olds if old in olds else (*olds, old)
    _refuse_gaps(found, source)
    return found


def _refuse_gaps(found: Mapping[str, Any], source: Folded) -> None:
    """Raise a UserError where a layer lacks a tensor that others have, or all of them one that each model has."""
    everywhere = {name.split(".", 2)[2] for name in found if name.startswith("blk.")} | _ESSENTIAL
    needed = [f"blk.{layer}.{part}" for layer in range(len(source.entries)) for part in sorted(everywhere)]
    for name in (_EMBEDDING, *needed):
        if name not in found:
            raise UserError(f"{source.where}: layout gguf: expected a tensor for {name}, got none; fold again")


def _tensors(
    checkpoint: Checkpoint, source: Folded, sizes: Sequence[int], stock: Any, number_type: str | None
) -> list[GgufTensor]:
    """Return the tensors of the checkpoint as the architecture has them; `sizes` are those of the groups of each layer."""
    kind, named = ARCHITECTURES[source.model_type], _named(checkpoint, source)
    projections = {name: (e, size) for e, size in zip(source.entries, sizes, strict=True) for name in e.names.values()}
    found, tied = [], _is_tied(checkpoint, named, stock)
    for new, olds in named.items():
        if new == _HEAD and tied:
            continue
        module, _, suffix = olds[0].rpartition(".")
        infos = [checkpoint.tensors[old] for old in olds]
        shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:])
        how = _moved(kind, source, module, suffix, *projections[module]) if module in projections else {}
        if len(olds) > 1 and how["rows"]:  # q, before k and v
            how["rows"] = (*how["rows"], *range(len(how["rows"]), shape[0] // how["head_dim"]))
        if len(shape) == 2 and module.rpartition(".")[2] in kind.transposed:
            how["transposed"], shape = True, shape[::-1]
        if kind.gain_offset and len(shape) == 1 and "norm" in module and suffix == "weight":
            how = {"offset": kind.gain_offset}
        found.append(tensor_of(new, olds, shape, number_type or OF_DTYPE.get(infos[0].dtype, "f32"), how))
    if tied and not kind.ties:
        (embeddings,) = (tensor for tensor in found if tensor.name == _EMBEDDING)
        found.append(replace(embeddings, name=_HEAD))
    return found


def _is_tied(checkpoint: Checkpoint, named: Mapping[str, tuple[str, ...]], stock: Any) -> bool:
    """Return whether the output embedding is the input's; transformers does not tie two that differ on disk."""
    if _HEAD not in named:
        return True
    head, embeddings = (checkpoint.read(named[name][0]) for name in (_HEAD, _EMBEDDING))
    return bool(stock.tie_word_embeddings) and torch.equal(head, embeddings)


def _frequency_factors(frequencies: Tensor, theta: float) -> Tensor:
    """Return what llama.cpp divides the plain frequencies of a base by."""
    dim = 2 * len(frequencies)
    plain = theta ** -(torch.arange(0, dim, 2).double() / dim)
    return (plain / frequencies.double()).float()


def _moved(
    kind: Architecture, source: Folded, module: str, suffix: str, entry: Entry, group_size: int
) -> dict[str, Any]:
    """Return how a projection is reordered: query heads into the order of their K/V heads, rotary dims into neighbouring pairs."""
    role = next(role for role, name in entry.names.items() if name == module)
    slots: Sequence[int] | None = entry.slots(group_size)
    slots = None if slots == tuple(range(entry.num_heads)) else slots
    half = entry.head_dim // 2
    pairs = [dim for first in range(half) for dim in (first, first + half)] if kind.pairs else None
    if role == "q":
        return {"rows": slots, "inside": pairs, "head_dim": entry.head_dim}
    if role == "k":
        return {"inside": pairs, "head_dim": entry.head_dim}
    if role == "qkv" and source.family.attentions[0].fused == "per-group":
        count, size = entry.groups.num_kv_heads, group_size + 2
        places = [group * size + slot for group in range(count) for slot in range(group_size)]
        places += [group * size + slot for slot in (group_size, group_size + 1) for group in range(count)]
        return {"rows": places, "head_dim": entry.head_dim}
    return {"columns": slots, "head_dim": entry.head_dim} if role == "o" and suffix == "weight" else {}


def tensor_of(
    new: str, olds: tuple[str, ...], shape: tuple[int, ...], number_type: str, how: dict[str, Any]
) -> GgufTensor:
    """Return a tensor of the file, in the number type that it gets where others get `number_type`."""
    heads, dim = how.get("rows") or how.get("columns"), how.get("head_dim", 1)
    if heads is not None:
        shape = (len(heads) * dim, *shape[1:]) if "rows" in how else (shape[0], len(heads) * dim)
    kind = number_type
    if kind == "q4_0" and new.split(".")[-2] in _MORE_BITS:
        kind = "q8_0"
    kind = "q4_0" if kind == PURE else kind
    if kind != "f32" and new.split(".")[-2] in _SMALL:
        kind = "bf16"
    if kind in ("q8_0", "q4_0") and shape[-1] % _BLOCK:
        kind = "f16"
    exact = len(shape) == 1 or new.split(".")[-2] in _EXACT
    return GgufTensor(new, shape, "f32" if exact else kind, olds, **how)
