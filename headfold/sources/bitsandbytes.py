"""bitsandbytes: 4-bit codes of a table (nf4, fp4) with a scale per block (Dettmers et al., 2305.14314), and 8-bit rows (2208.07339)."""

import math

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.json_input import parse_object
from .packing import ORIGINAL, Format, Parts, Settings, bytes_of, check_shape, part

_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


def check(settings: Settings, where: str) -> str:
    """Return what the weights are.

    Raises:
        UserError: neither 4 nor 8 bits.
    """
    bits = 8 if settings.get("load_in_8bit") else 4 if settings.get("load_in_4bit") else None
    if bits is None:
        raise UserError(f"{where}: expected load_in_4bit or load_in_8bit, got neither; {ORIGINAL}")
    kind = f" ({settings.get('bnb_4bit_quant_type', 'fp4')})" if bits == 4 else ""
    return f"{bits}-bit bitsandbytes weights{kind:.10}"


def decode(parts: Parts, settings: Settings, where: str) -> Tensor:
    """Return the table's numbers times the scales of their blocks, or 8-bit rows times the largest of each row.

    Raises:
        UserError: a part is missing or has another shape.
    """
    packed = part(parts, ".weight", where)
    if ".SCB" in parts:
        return _eight_bits(packed, parts, where)
    named = next((name for name in _STATES if name in parts), _STATES[0])
    state = parse_object(bytes(part(parts, named, where).to(torch.uint8).tolist()), f"{where}: quant_state")
    shape = _shape(state, 2 * packed.numel() * packed.element_size(), where)
    count = math.prod(shape)
    codes = packed.reshape(-1).view(torch.uint8)
    check_shape(f"{where}: weight", codes, (-(-count // 2),))
    codes = torch.stack([codes >> 4, codes & 15], 1).reshape(-1)[:count].long()
    table = part(parts, ".weight.quant_map", where).float()
    check_shape(f"{where}: quant_map", table, (16,))
    return _scaled(table[codes], _scales(parts, state, where), _block(state, "blocksize", where), where).view(shape)


def _shape(state: Settings, most: int, where: str) -> list[int]:
    """Return the shape of a weight, which has no more elements than its bytes hold."""
    shape = state.get("shape")
    sizes = shape if isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape) else [0]
    if not 0 < math.prod(sizes) <= most:
        raise UserError(f"{where}: quant_state: expected the shape of its weights, got {shape!r:.60}; {ORIGINAL}")
    return sizes


def _scales(parts: Parts, state: Settings, where: str) -> Tensor:
    """Return the scale of every block; where they are packed again, by 8-bit codes and scales of their own, around a mean."""
    scales = part(parts, ".weight.absmax", where)
    if ".weight.nested_absmax" not in parts:
        return scales.float()
    table = part(parts, ".weight.nested_quant_map", where).float()
    check_shape(f"{where}: nested_quant_map", table, (256,))
    mean = state.get("nested_offset")
    if not isinstance(mean, int | float):
        raise UserError(f"{where}: quant_state: nested_offset: expected a number, got {mean!r:.60}; {ORIGINAL}")
    size = _block(state, "nested_blocksize", where)
    return _scaled(table[scales.long()], parts[".weight.nested_absmax"].float(), size, where) + mean


def _block(state: Settings, name: str, where: str) -> int:
    size = state.get(name)
    if type(size) is not int or not 0 < size <= 2**20:
        raise UserError(f"{where}: quant_state: {name}: expected the elements of a block, got {size!r:.60}; {ORIGINAL}")
    return size


def _scaled(values: Tensor, scales: Tensor, size: int, where: str) -> Tensor:
    """Return a list of numbers, each block of `size` times its scale."""
    check_shape(f"{where}: absmax", scales, (-(-len(values) // size),))
    return values * scales.repeat_interleave(size)[: len(values)]


def _eight_bits(packed: Tensor, parts: Parts, where: str) -> Tensor:
    scales = parts[".SCB"].float()
    check_shape(f"{where}: SCB", scales, (len(packed),))
    if packed.dtype != torch.int8 or int(parts.get(".weight_format", torch.zeros(1)).sum()):
        raise UserError(f"{where}: expected rows of int8, got another layout; {ORIGINAL}")
    return packed.float() * scales[:, None] / 127


FORMAT = Format(
    method="bitsandbytes",
    title="bitsandbytes, 4 bits (nf4, fp4, nested scales too) and 8 bits",
    checked_against="files that bitsandbytes wrote",
    keys=(".weight.absmax", ".SCB"),
    parts=(
        ".weight", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", ".weight_format", *_STATES,
    ),
    target=".weight",
    check=check,
    decode=decode,
    num_weights=lambda parts, settings: bytes_of(parts, ".weight") * (1 if settings.get("load_in_8bit") else 2),
)  # fmt: skip
