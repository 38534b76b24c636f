"""MXFP4 (the microscaling formats of the Open Compute Project), as gpt-oss keeps its experts: 4-bit floats, 32 to a power of two."""

import torch
from torch import Tensor

from ..core.errors import UserError
from .packing import ORIGINAL, Format, Parts, Settings, bytes_of, check_shape, part

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of a sign, two bits of exponent and one of mantissa, without the sign."""
_BIAS = 127


def check(settings: Settings, where: str) -> str:
    """Return what the weights are."""
    del settings, where
    return "4-bit MXFP4 experts"


def decode(parts: Parts, settings: Settings, where: str) -> Tensor:
    """Return the experts as (expert, input, output), the order in which their class multiplies them.

    Raises:
        UserError: a part is missing or has another shape.
    """
    del settings
    blocks, scales = part(parts, "_blocks", where), part(parts, "_scales", where)
    if blocks.dim() != 4 or torch.uint8 not in (blocks.dtype, scales.dtype):
        raise UserError(f"{where}: expected four axes of bytes, got the shape {tuple(blocks.shape)}; {ORIGINAL}")
    check_shape(f"{where}: scales", scales, tuple(blocks.shape[:-1]))
    numbers = four_bit_floats(blocks) * torch.exp2(scales.float() - _BIAS)[..., None]
    return numbers.flatten(2).transpose(1, 2).contiguous()


def four_bit_floats(packed: Tensor) -> Tensor:
    """Return the floats of bytes along the last axis, the lower half of each byte first."""
    table = torch.tensor([*E2M1, *(-number for number in E2M1)])
    return table[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


FORMAT = Format(
    method="mxfp4",
    title="MXFP4 experts of gpt-oss",
    checked_against="the decoder of transformers",
    keys=("_blocks",),
    parts=("_scales",),
    target="",
    check=check,
    decode=decode,
    num_weights=lambda parts, settings: 2 * bytes_of(parts, "_blocks"),
    otherwise=torch.bfloat16,
)
