"""FP8 weights with a scale for the tensor, for each row, or for each block of rows and columns (DeepSeek, Qwen)."""

import torch
from torch import Tensor

from ..core.errors import UserError
from .packing import ORIGINAL, Format, Parts, Settings, bytes_of, part


def check(settings: Settings, where: str) -> str:
    """Return what the weights are."""
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise UserError(f"{where}: weight_block_size: expected two sizes, got {block!r:.60}; {ORIGINAL}")
    return "FP8 weights"


def decode(parts: Parts, settings: Settings, where: str) -> Tensor:
    """Return the float8 numbers times their scales.

    Raises:
        UserError: a part is missing, is no float8, or has another shape.
    """
    packed = part(parts, "", where)
    if not packed.dtype.is_floating_point or packed.element_size() != 1:
        raise UserError(f"{where}: expected float8 numbers, got {packed.dtype}; {ORIGINAL}")
    scale = next(parts[key] for key in FORMAT.keys if key in parts).float()
    return packed.float() * widened(scale, packed, settings.get("weight_block_size"), f"{where}: scale")


def widened(scale: Tensor, packed: Tensor, block: list[int] | None, where: str) -> Tensor:
    """Return scales so that they multiply a weight: one for all, one per row, or one per block, the last of which may be cut.

    Raises:
        UserError: the scales have none of these shapes.
    """
    *batch, rows, columns = packed.shape if packed.dim() > 1 else (1, *packed.shape)
    if scale.numel() == 1:
        return scale.reshape(())
    if tuple(scale.shape) in ((rows,), (rows, 1)) and packed.dim() == 2:
        return scale.reshape(rows, 1)
    high, wide = block or (1, 1)
    expected = (*batch, -(-rows // high), -(-columns // wide))
    if block is None or tuple(scale.shape) != expected:
        shapes = f"1 number, {rows} rows" + (f" or the shape {expected}" if block else "")
        raise UserError(f"{where}: expected {shapes}, got the shape {tuple(scale.shape)}; {ORIGINAL}")
    return scale.repeat_interleave(high, -2)[..., :rows, :].repeat_interleave(wide, -1)[..., :columns]


FORMAT = Format(
    method="fp8",
    title="FP8, one scale per tensor, row or block",
    checked_against="files built to its specification",
    keys=("_scale_inv", "_scale"),
    parts=("",),
    target="",
    check=check,
    decode=decode,
    num_weights=lambda parts, settings: bytes_of(parts, ""),
    unused=(".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".input_scale_ub"),
    otherwise=torch.bfloat16,
)
