"""What the pages of quantised formats share: the description of a format, and integers packed into words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..checkpoint.headers import TensorInfo
from ..core.errors import UserError

Parts = Mapping[str, Tensor]
"""The tensors of one packed weight, by what follows its name: ".qweight", ".scales" …"""
Headers = Mapping[str, TensorInfo]
"""The same of a weight that is not read."""
Settings = Mapping[str, Any]
"""The quantisation config."""
_WORD = 32
ORIGINAL = "download it again, or start from the original"


@dataclass(frozen=True, slots=True)
class Format:
    """How a method of quantisation keeps a weight, and what makes a float tensor of it."""

    method: str
    """As `quant_method` of the config says it."""
    title: str
    """The format in the table of sources."""
    checked_against: str
    """What the decoder is tested against."""
    keys: tuple[str, ...]
    """Endings of names: where one of these is, there is a packed weight."""
    parts: tuple[str, ...]
    """Endings of the names of its other tensors."""
    target: str
    """What follows the weight's name in the plain checkpoint."""
    check: Callable[[Settings, str], str]
    """Refuses settings that the page does not read, and returns what the weights are, as in "4-bit GPTQ weights"."""
    decode: Callable[[Parts, Settings, str], Tensor]
    """Returns the weight in float32 from its parts; the last argument names it in messages."""
    num_weights: Callable[[Headers, Settings], int]
    """Returns how many numbers the weight has, at most: what its parts say of it, which may be missing."""
    unused: tuple[str, ...] = ()
    """Endings of the names of tensors that belong to activations or caches: they are left out."""
    otherwise: torch.dtype = torch.float16
    """Dtype of the weights where the config names none."""


def bytes_of(parts: Headers, name: str) -> int:
    """Return the bytes of a part; none where it is missing."""
    return parts[name].end - parts[name].start if name in parts else 0


def check_shape(where: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Check the shape of a part.

    Raises:
        UserError: names both shapes.
    """
    if tuple(tensor.shape) != expected:
        raise UserError(f"{where}: expected the shape {expected}, got {tuple(tensor.shape)}; {ORIGINAL}")


def whole_number(settings: Settings, name: str, where: str, allowed: Callable[[int], bool], expected: str) -> int:
    """Return a whole number of the settings.

    Raises:
        UserError: it is not there, or not allowed.
    """
    value = settings.get(name)
    if type(value) is not int or not allowed(value):
        got = "none" if value is None else repr(value)[:60]
        raise UserError(f"{where}: {name}: expected {expected}, got {got}; add it as the model's card gives it")
    return value


def part(parts: Parts, name: str, where: str) -> Tensor:
    """Return a part of a packed weight.

    Raises:
        UserError: it is not there.
    """
    if name not in parts:
        raise UserError(f"{where}: expected {name.lstrip('._')} beside it, got none; {ORIGINAL}")
    return parts[name]


def words(parts: Parts, name: str, where: str) -> Tensor:
    """Return a part that is a matrix of int32 words.

    Raises:
        UserError: it is not there, or something else.
    """
    found = part(parts, name, where)
    if found.dim() != 2 or found.dtype != torch.int32:
        raise UserError(
            f"{where}: {name.lstrip('._')}: expected a matrix of int32 words, got {found.dtype} of shape {tuple(found.shape)}; {ORIGINAL}"
        )
    return found


def unpack(words: Shaped[Tensor, "rows words"], bits: int) -> Shaped[Tensor, "rows values"]:
    """Return the unsigned integers that int32 words hold, the lowest bits first, along the last axis."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)


def unpack_rows(words: Shaped[Tensor, "words columns"], bits: int) -> Shaped[Tensor, "values columns"]:
    """Return the same where a word holds neighbours of the first axis."""
    return unpack(words.T.contiguous(), bits).T
