"""AWQ (Lin et al., 2306.00978) in the layout "gemm": 4-bit integers in int32 words along the outputs, in an order of their own."""

from torch import Tensor

from ..core.errors import UserError
from .packing import ORIGINAL, Format, Parts, Settings, bytes_of, check_shape, part, unpack, whole_number, words

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in its word each of eight neighbours is."""


def check(settings: Settings, where: str) -> str:
    """Return what the weights are.

    Raises:
        UserError: another number of bits, no group size, or another layout.
    """
    whole_number(settings, "bits", where, lambda value: value == 4, "4 bits per weight")
    whole_number(settings, "group_size", where, lambda value: value == -1 or value > 0, "the inputs per group, or -1")
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if layout != "gemm":
        raise UserError(f"{where}: version: expected the layout gemm, got {layout!r:.40}; {ORIGINAL}")
    return "4-bit AWQ weights"


def decode(parts: Parts, settings: Settings, where: str) -> Tensor:
    """Return `scale * (integer - zero)`, transposed to (outputs, inputs).

    Raises:
        UserError: a part is missing or has another shape.
    """
    packed, zeros = words(parts, ".qweight", where), words(parts, ".qzeros", where)
    scales = part(parts, ".scales", where).float()
    integers = _in_order(packed)
    num_inputs, num_outputs = integers.shape
    size = settings["group_size"] if settings["group_size"] > 0 else num_inputs
    groups = -(-num_inputs // size)
    check_shape(f"{where}: scales", scales, (groups, num_outputs))
    check_shape(f"{where}: qzeros", zeros, (groups, packed.shape[1]))
    wide = [each.repeat_interleave(size, 0)[:num_inputs] for each in (scales, _in_order(zeros))]
    return (wide[0] * (integers - wide[1]).float()).T.contiguous()


def _in_order(packed: Tensor) -> Tensor:
    rows = len(packed)
    return unpack(packed, 4).view(rows, -1, 8)[:, :, _PLACES].reshape(rows, -1)


FORMAT = Format(
    method="awq",
    title="AWQ, 4 bits, layout gemm",
    checked_against="files built to its specification",
    keys=(".qweight",),
    parts=(".qzeros", ".scales"),
    target=".weight",
    check=check,
    decode=decode,
    num_weights=lambda parts, settings: 2 * bytes_of(parts, ".qweight"),
)
