"""compressed-tensors, as llm-compressor writes it for vLLM: integers packed into words, int8, or float8, with scales."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from .float8 import widened
from .packing import ORIGINAL, Format, Headers, Parts, Settings, bytes_of, check_shape, part, unpack, unpack_rows

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_BITS = (2, 4, 8)


def check(settings: Settings, where: str) -> str:
    """Return what the weights are.

    Raises:
        UserError: another packing, or sparse weights.
    """
    packings = {
        str(settings.get("format")),
        *(str(group["format"]) for group in _groups(settings) if "format" in group),
    }
    for packing in sorted(packings):
        if packing not in _FORMATS:
            raise UserError(
                f"{where}: quantization_config: format: expected {', '.join(_FORMATS)}, got {packing!r:.40}; {ORIGINAL}"
            )
    sparse = settings.get("sparsity_config") or {}
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise UserError(f"{where}: sparsity_config: expected dense weights, got {sparse['format']!r:.40}; {ORIGINAL}")
    kinds = sorted({f"{weights.get('num_bits')}-bit {weights.get('type')}" for weights in _weights(settings)})
    return f"{' and '.join(kinds) or 'quantised'} weights of compressed-tensors"


def _groups(settings: Settings) -> Iterator[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    yield from (group for group in (groups if isinstance(groups, dict) else {}).values() if isinstance(group, dict))


def _weights(settings: Settings) -> Iterator[Mapping[str, Any]]:
    yield from (weights for group in _groups(settings) if isinstance(weights := group.get("weights"), dict))


def decode(parts: Parts, settings: Settings, where: str) -> Tensor:
    """Return `scale * (number - zero)`.

    Raises:
        UserError: a part is missing or has another shape.
    """
    scales = part(parts, ".weight_scale", where).float()
    zeros = parts.get(".weight_zero_point")
    if ".weight_packed" in parts:
        integers = _integers(parts, where)
        # Where integers are packed into words, their zeros are, too, along the outputs.
        if zeros is not None and zeros.dtype == torch.int32:
            bits = _bits(parts, where)
            zeros = unpack_rows(zeros, bits)[: len(scales)] - 2 ** (bits - 1)
        numbers = integers.float()
    else:
        numbers = part(parts, ".weight", where).float()
    if numbers.dim() != 2:
        raise UserError(f"{where}: expected a matrix, got the shape {tuple(numbers.shape)}; {ORIGINAL}")
    block = next((w["block_structure"] for w in _weights(settings) if w.get("block_structure")), None)
    order = parts.get(".weight_g_idx")
    if zeros is not None:
        numbers = numbers - _wide(zeros.float(), numbers, block, order, f"{where}: zero_point")
    return numbers * _wide(scales, numbers, block, order, f"{where}: scale")


def _bits(parts: Parts, where: str) -> int:
    """Return the bits per weight, which the shapes give."""
    columns, words = _shape(parts, where)[1], parts[".weight_packed"].shape[1]
    for bits in _BITS:
        if words == -(-columns * bits // 32):
            return bits
    raise UserError(f"{where}: expected 2, 4 or 8 bits per weight, got {words} words for {columns}; {ORIGINAL}")


def _shape(parts: Parts, where: str) -> tuple[int, int]:
    shape = part(parts, ".weight_shape", where)
    check_shape(f"{where}: weight_shape", shape, (2,))
    rows, columns = (int(size) for size in shape)
    packed = parts[".weight_packed"]
    if packed.dim() != 2 or packed.dtype != torch.int32 or rows != len(packed) or columns < 1:
        raise UserError(
            f"{where}: expected int32 words for {rows} rows, got {packed.dtype} of shape {tuple(packed.shape)}; {ORIGINAL}"
        )
    return rows, columns


def _integers(parts: Parts, where: str) -> Tensor:
    columns, bits = _shape(parts, where)[1], _bits(parts, where)
    return unpack(parts[".weight_packed"], bits)[:, :columns] - 2 ** (bits - 1)


def _wide(scales: Tensor, numbers: Tensor, block: list[int] | None, order: Tensor | None, where: str) -> Tensor:
    """Return scales so that they multiply the weight; groups of inputs are all of one size."""
    rows, columns = numbers.shape
    groups = scales.shape[1] if scales.dim() == 2 else 1
    if block or scales.dim() != 2 or len(scales) != rows or groups == 1:
        return widened(scales, numbers, block, where)
    if order is not None:
        check_shape(where.replace("scale", "g_idx"), order, (columns,))
        if not 0 <= int(order.min()) <= int(order.max()) < groups:
            raise UserError(f"{where}: expected groups from 0 to {groups - 1}, got others; {ORIGINAL}")
        return scales[:, order.long()]
    if columns % groups:
        raise UserError(f"{where}: expected groups that divide {columns} inputs, got {groups}; {ORIGINAL}")
    return scales.repeat_interleave(columns // groups, 1)


def _num_weights(parts: Headers, settings: Settings) -> int:
    """Return the numbers of a weight; where groups of modules have their own bits, as if it had the fewest."""
    if ".weight_packed" not in parts:
        return bytes_of(parts, ".weight")
    named = [weights.get("num_bits") for weights in _weights(settings)]
    fewest = next((bits for bits in _BITS if bits in named), _BITS[0])
    return bytes_of(parts, ".weight_packed") * 8 // fewest


FORMAT = Format(
    method="compressed-tensors",
    title="compressed-tensors: packed 4 and 8 bits, int8, float8",
    checked_against="files that compressed-tensors wrote",
    keys=(".weight_scale",),
    parts=(".weight", ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
    target=".weight",
    check=check,
    decode=decode,
    num_weights=_num_weights,
    unused=(
        ".input_scale",
        ".input_zero_point",
        ".k_scale",
        ".v_scale",
        ".q_scale",
        ".output_scale",
        ".input_global_scale",
    ),
    otherwise=torch.bfloat16,
)
