"""A fold as llama.cpp reads it: the fields that describe it, and its tensors under other names, in another order and number type."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..rotary_tables import rotary_table
from .folded import Entry, Folded, stock_config
from .gguf_architectures import APPROXIMATED, ARCHITECTURES, Architecture, architecture_why_not
from .pieces import picked

if TYPE_CHECKING:
    import gguf

MODEL_TYPES = tuple(ARCHITECTURES)
PURE = "q4_0-pure"
"""q4_0 for all matrices."""
NUMBER_TYPES = ("f32", "bf16", "f16", "q8_0", "q4_0", PURE)
_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""Number type that holds a dtype; f32 for others."""
_MORE_BITS = ("attn_k", "attn_v", "attn_output", "token_embd", "output")
"""Tensors that are q8_0 where the others are q4_0: embeddings as llama.cpp itself keeps them in more bits, the shared heads, and what
reads their values.
"""
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BLOCK = 32
"""Numbers that share a scale in q8_0 and q4_0: a row holds a whole number of such blocks, else it is f16."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file: `old` is its name in the checkpoint, or `values` are its numbers.

    `rows` and `columns` pick heads of `head_dim`, `inside` reorders the dims of each head, as in `pieces.Linear`.
    """

    name: str
    shape: tuple[int, ...]
    number_type: str
    old: str = ""
    values: Tensor | None = None
    rows: Sequence[int] | None = None
    columns: Sequence[int] | None = None
    inside: Sequence[int] | None = None
    head_dim: int = 1
    offset: float = 0.0
    """What is added to every number."""

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

        tensor = checkpoint.read(self.old) if self.values is None else self.values
        tensor = picked(tensor, self.rows, self.head_dim, 0, self.inside)
        tensor = picked(tensor, self.columns, self.head_dim, 1)
        values = (tensor.float() + self.offset).contiguous().numpy()
        if not np.isfinite(values).all():
            raise UserError(f"{self.old}: expected finite numbers, got NaN or infinity; fold again from good weights")
        if self.number_type == "f16" and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise UserError(f"{self.old}: expected numbers that float16 holds, got {np.abs(values).max():g}; use bf16")
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

    @property
    def heads(self) -> str:
        """The heads of the model in words."""
        query, key = (n[0] if len(set(n)) == 1 else n for n in (self.num_heads, self.num_kv_heads))
        heads = f"{query} query heads and {key} K/V heads of {self.head_dim}"
        return "; ".join(filter(None, (heads, APPROXIMATED.get(self.stock.hidden_act, ""))))

    def add_fields(self, writer: "gguf.GGUFWriter") -> None:
        """Write all fields but those of the tokenizer."""
        import gguf

        stock = self.stock
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[self.number_type]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(self.vocab_size)
        writer.add_context_length(stock.max_position_embeddings)
        writer.add_embedding_length(stock.hidden_size)
        writer.add_block_count(stock.num_hidden_layers)
        # Arrays need all three: llama.cpp reads the counts of a layer together.
        arrays = self.architecture == self.kind.per_layer
        writer.add_feed_forward_length(
            [stock.intermediate_size] * stock.num_hidden_layers if arrays else stock.intermediate_size
        )
        writer.add_head_count(list(self.num_heads) if arrays else self.num_heads[0])
        writer.add_head_count_kv(list(self.num_kv_heads) if arrays else self.num_kv_heads[0])
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        epsilon = writer.add_layer_norm_eps if self.kind.layer_norm else writer.add_layer_norm_rms_eps
        named = self.kind.epsilon
        epsilon(named if isinstance(named, float) else getattr(stock, named))
        for field, method in self.kind.scales.items():
            getattr(writer, method)(float(getattr(stock, field)))
        if hasattr(stock, "use_parallel_residual"):
            writer.add_parallel_residual(stock.use_parallel_residual)
        writer.add_rope_dimension_count(self.rotary_dim)
        writer.add_rope_freq_base(float(stock.rope_parameters["rope_theta"]))
        if self.attention_factor != 1:
            writer.add_rope_scaling_attn_factors(self.attention_factor)


_FILE_TYPES = {
    "f32": "ALL_F32", PURE: "MOSTLY_Q4_0", **{name: f"MOSTLY_{name.upper()}" for name in ("bf16", "f16", "q8_0", "q4_0")},
}  # fmt: skip


def model_why_not(checkpoint: Checkpoint, source: Folded) -> str | None:
    """Return why llama.cpp cannot compute what a fold of these types computes."""
    stock = stock_config(source)
    reason = architecture_why_not(source, stock)
    rotary_table(source.config)
    for number in (stock.rope_parameters["rope_theta"], stock.max_position_embeddings, stock.num_hidden_layers):
        float(number)  # raises for what is no number, before anything is written
    if reason is None and not stock.tie_word_embeddings and _HEAD not in checkpoint.tensors:
        reason = f"expected {_HEAD}, as the embeddings are not tied, got none"
    return reason


def described(checkpoint: Checkpoint, source: Folded, number_type: str | None) -> GgufModel:
    """Return what is written of a fold, without reading a tensor but embeddings that may be tied."""
    kind, stock, entries = ARCHITECTURES[source.model_type], stock_config(source), source.entries
    sizes = [source.group_size if source.is_uniform else entry.group_size for entry in entries]
    frequencies, factor = rotary_table(source.config)
    architecture = kind.name if source.is_uniform else kind.per_layer
    tensors = _tensors(checkpoint, source, architecture, sizes, stock, number_type)
    if number_type is None:
        number_type = _OF_DTYPE.get(checkpoint.tensors[f"{entries[0].names['k']}.weight"].dtype, "f32")
    if stock.rope_parameters["rope_type"] != "default":
        factors = _frequency_factors(frequencies, float(stock.rope_parameters["rope_theta"]))
        tensors.append(GgufTensor("rope_freqs.weight", tuple(factors.shape), "f32", values=factors))
    return GgufModel(
        architecture=architecture,
        number_type=number_type,
        kind=kind,
        stock=stock,
        num_heads=tuple(count * size for count, size in zip(source.counts, sizes, strict=True)),
        num_kv_heads=source.counts,
        head_dim=entries[0].head_dim,
        rotary_dim=2 * len(frequencies),
        vocab_size=checkpoint.tensors[_EMBEDDING].shape[0],
        attention_factor=factor,
        tensors=tuple(tensors),
        name=checkpoint.path.resolve().name,
    )


def _tensors(
    checkpoint: Checkpoint, source: Folded, architecture: str, sizes: Sequence[int], stock: Any, number_type: str | None
) -> list[GgufTensor]:
    """Return the tensors of the checkpoint as the architecture has them; `sizes` are those of the groups of each layer."""
    import gguf

    kind = ARCHITECTURES[source.model_type]
    (found_architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(found_architecture, stock.num_hidden_layers)
    projections = {name: (e, size) for e, size in zip(source.entries, sizes, strict=True) for name in e.names.values()}
    found, tied = [], _is_tied(checkpoint, stock)
    for old, info in checkpoint.tensors.items():
        module, _, suffix = old.rpartition(".")
        if suffix not in ("weight", "bias") or (old == _HEAD and tied):
            continue
        new = names.get_name(old, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(f"{source.where}: layout gguf: {old}: llama.cpp's {architecture} has no such tensor")
        how = _moved(kind, module, suffix, *projections[module]) if module in projections else {}
        if kind.gain_offset and len(info.shape) == 1 and "norm" in module and suffix == "weight":
            how = {"offset": kind.gain_offset}
        found.append(_tensor(new, old, info.shape, number_type or _OF_DTYPE.get(info.dtype, "f32"), how))
    if tied and not kind.ties:
        (embeddings,) = (tensor for tensor in found if tensor.name == "token_embd.weight")
        found.append(replace(embeddings, name="output.weight"))
    return found


def _is_tied(checkpoint: Checkpoint, stock: Any) -> bool:
    """Return whether the output embedding is the input's; transformers does not tie two that differ on disk."""
    if _HEAD not in checkpoint.tensors:
        return True
    return bool(stock.tie_word_embeddings) and torch.equal(checkpoint.read(_HEAD), checkpoint.read(_EMBEDDING))


def _frequency_factors(frequencies: Tensor, theta: float) -> Tensor:
    """Return what llama.cpp divides the plain frequencies of a base by."""
    dim = 2 * len(frequencies)
    plain = theta ** -(torch.arange(0, dim, 2).double() / dim)
    return (plain / frequencies.double()).float()


def _moved(kind: Architecture, module: str, suffix: str, entry: Entry, group_size: int) -> dict[str, Any]:
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
    return {"columns": slots, "head_dim": entry.head_dim} if role == "o" and suffix == "weight" else {}


def _tensor(new: str, old: str, shape: tuple[int, ...], number_type: str, how: dict[str, Any]) -> GgufTensor:
    heads, dim = how.get("rows") or how.get("columns"), how.get("head_dim", 1)
    if heads is not None:
        shape = (len(heads) * dim, *shape[1:]) if "rows" in how else (shape[0], len(heads) * dim)
    kind = number_type
    if kind == "q4_0" and new.split(".")[-2] in _MORE_BITS:
        kind = "q8_0"
    kind = "q4_0" if kind == PURE else kind
    if kind in ("q8_0", "q4_0") and shape[-1] % _BLOCK:
        kind = "f16"
    return GgufTensor(new, shape, "f32" if len(shape) == 1 else kind, old, **how)
