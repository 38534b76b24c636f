"""GPTQ (Frantar et al., 2210.17323), as GPTQModel and AutoGPTQ write it: integers in int32 words along the inputs."""

import math

import torch
from torch import Tensor

from ..core.errors import UserError
from .packing import (
    ORIGINAL,
    Format,
    Headers,
    Parts,
    Settings,
    bytes_of,
    check_shape,
    part,
    unpack,
    unpack_rows,
    whole_number,
    words,
)

_BITS = (2, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


def check(settings: Settings, where: str) -> str:
    """Return what the weights are.

    Raises:
        UserError: no number of bits that fills a word, no group size, or another packing.
    """
    bits = whole_number(settings, "bits", where, lambda value: value in _BITS, "2, 4 or 8 bits per weight")
    whole_number(settings, "group_size", where, lambda value: value == -1 or value > 0, "the inputs per group, or -1")
    packing = settings.get("checkpoint_format") or "gptq"
    if packing not in _FORMATS:
        raise UserError(f"{where}: checkpoint_format: expected gptq or gptq_v2, got {packing!r:.40}; {ORIGINAL}")
    return f"{bits}-bit GPTQ weights"


def decode(parts: Parts, settings: Settings, where: str) -> Tensor:
    """Return `scale * (integer - zero)`, transposed to (outputs, inputs).

    The first version of the format stores zeros less one, the second as they are. `g_idx` gives the group of each input, which runs
    in order unless inputs were quantised in the order of their activations.

    Raises:
        UserError: a part is missing or has another shape.
    """
    packed, zeros = words(parts, ".qweight", where), words(parts, ".qzeros", where)
    scales, order = part(parts, ".scales", where).float(), parts.get(".g_idx")
    bits = _bits_of(packed, order, settings, where)
    integers = unpack_rows(packed, bits)
    num_inputs, num_outputs = integers.shape
    size = settings["group_size"] if settings["group_size"] > 0 else num_inputs
    groups = -(-num_inputs // size) if not settings.get("dynamic") else len(scales)
    check_shape(f"{where}: scales", scales, (groups, num_outputs))
    check_shape(f"{where}: qzeros", zeros, (groups, num_outputs * bits // 32))
    if order is None:
        order = torch.arange(num_inputs) // size
    check_shape(f"{where}: g_idx", order, (num_inputs,))
    if num_inputs and not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise UserError(f"{where}: g_idx: expected groups from 0 to {groups - 1}, got others; {ORIGINAL}")
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    zero = (unpack(zeros, bits) + offset) & (2**bits - 1)
    order = order.long()
    return (scales[order] * (integers - zero[order]).float()).T.contiguous()


def _bits_of(packed: Tensor, order: Tensor | None, settings: Settings, where: str) -> int:
    """Return the bits per weight: those of the settings, or, where modules have their own, those that the shapes give."""
    if not settings.get("dynamic"):
        return int(settings["bits"])
    found = len(packed) * 32 // max(len(order), 1) if order is not None else settings["bits"]
    if found not in _BITS:
        raise UserError(f"{where}: expected 2, 4 or 8 bits per weight, got {found}; {ORIGINAL}")
    return int(found)


def _num_weights(parts: Headers, settings: Settings) -> int:
    """Return the numbers of a weight; where modules have their own bits, `g_idx` has an entry for each input."""
    packed, order = parts.get(".qweight"), parts.get(".g_idx")
    if settings.get("dynamic") and packed is not None and order is not None:
        return math.prod((*order.shape, *packed.shape[-1:]))
    return bytes_of(parts, ".qweight") * 8 // settings["bits"]


FORMAT = Format(
    method="gptq",
    title="GPTQ, 2, 4 or 8 bits",
    checked_against="files built to its specification",
    keys=(".qweight",),
    parts=(".qzeros", ".scales", ".g_idx"),
    target=".weight",
    check=check,
    decode=decode,
    num_weights=_num_weights,
)
