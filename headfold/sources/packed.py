"""Checkpoints of quantised weights: which format, what makes each tensor of the plain checkpoint, and the stream of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.config import CONFIG, read_config
from ..checkpoint.headers import PACKED_DTYPES
from ..checkpoint.reader import Checkpoint
from ..checkpoint.refusals import check_finite, is_packed
from ..core.errors import UserError, listed
from ..core.json_input import read_object
from . import awq, bitsandbytes, compressed_tensors, float8, gptq, mxfp4
from .packing import ORIGINAL, Format, Settings, bytes_of
from .weights import Weights, dtype_name, plain_dtype

FORMATS = (
    bitsandbytes.FORMAT,
    gptq.FORMAT,
    awq.FORMAT,
    float8.FORMAT,
    compressed_tensors.FORMAT,
    mxfp4.FORMAT,
)
_OTHER_NAMES = {"fbgemm_fp8": "fp8", "compressed_tensors": "compressed-tensors"}
"""`quant_method` of the same layout of tensors."""
_KEYS = ("quantization_config", "compression_config")
BESIDE = "quantize_config.json"
"""Where AutoGPTQ keeps the settings that the config lacks; it does not go along with decoded weights."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """A tensor of the plain checkpoint, and those that it is made of, by their endings; none but itself where it is not packed."""

    name: str
    parts: Mapping[str, str]

    @property
    def is_packed(self) -> bool:
        return [*self.parts.values()] != [self.name]


def settings_of(directory: Path) -> Settings | None:
    """Return the quantisation config of a checkpoint directory; None where it has none.

    Raises:
        UserError: a config that is not JSON.
    """
    config = read_config(directory)
    for key in _KEYS:
        if isinstance(found := config.get(key), dict) and found:
            return found
    beside = directory / BESIDE
    if not beside.is_file() or not any(name.endswith(gptq.FORMAT.keys) for name in _packed(directory).tensors):
        return None
    return {"quant_method": "gptq", **read_object(beside)}


def _packed(directory: Path) -> Checkpoint:
    return Checkpoint.open(directory, packed=True)


def format_of(settings: Settings) -> Format | None:
    """Return the page that reads a method of quantisation; None where there is none."""
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "")
    name = _OTHER_NAMES.get(str(method), method)
    return next((page for page in FORMATS if page.method == name), None)


def open_packed(directory: Path, page: Format, settings: Settings) -> Weights:
    """Return the weights of a quantised checkpoint; no data are read.

    Raises:
        UserError: what `Checkpoint.open` refuses, settings that the page does not read, or packed tensors that lack a part.
    """
    what = page.check(settings, f"{directory / CONFIG}: quantization_config")
    checkpoint = _packed(directory)
    config = {key: value for key, value in checkpoint.config.items() if key not in (*_KEYS, "torch_dtype")}
    dtype = plain_dtype(checkpoint.config, page.otherwise)
    units = _units(checkpoint, page)
    return Weights(
        config={**config, "dtype": dtype_name(dtype)},
        names=tuple(unit.name for unit in units),
        num_bytes=sum(_num_bytes(checkpoint, page, settings, unit, dtype) for unit in units),
        tensors=partial(_tensors, checkpoint, page, settings, units, dtype),
        beside=directory,
        origin=f"{what}, dequantised to {dtype_name(dtype)}",
        quantised=True,
    )


def _units(checkpoint: Checkpoint, page: Format) -> list[_Unit]:
    """Return what is written, in the order of the source's tensors."""
    names = checkpoint.tensors
    kept = [name for name in names if not name.endswith(page.unused or ("\0",))]
    packed: dict[str, _Unit] = {}
    for name in kept:
        key = next((ending for ending in page.keys if name.endswith(ending)), None)
        if key is None:
            continue
        stem = name.removesuffix(key)
        parts = {key: name} | {end: stem + end for end in page.parts if stem + end in names and stem + end != name}
        # A scale alone is a tensor of its own; a page says so of a weight that lacks a part.
        if len(parts) > 1 or names[name].dtype in (torch.int32, torch.uint8, torch.int8):
            packed |= dict.fromkeys(parts.values(), _Unit(stem + page.target, parts))
    units = list(dict.fromkeys(packed[name].name if name in packed else name for name in kept))
    made = {unit.name: unit for unit in packed.values()}
    found = [made.get(name, _Unit(name, {"": name})) for name in units]
    left = [unit.name for unit in found if unit.name not in made and _is_packed(unit.name, checkpoint)]
    if left:
        raise UserError(
            f"{checkpoint.path}: expected scales beside every packed weight of {page.method}, got none beside {listed(left)}; {ORIGINAL}"
        )
    if not made:
        raise UserError(
            f"{checkpoint.path / CONFIG}: quantization_config: expected weights of {page.method}, got none in the files; remove the field"
        )
    return found


def _num_bytes(checkpoint: Checkpoint, page: Format, settings: Settings, unit: _Unit, dtype: torch.dtype) -> int:
    """Return how many bytes a tensor is written with, at most."""
    parts = {ending: checkpoint.tensors[name] for ending, name in unit.parts.items()}
    if unit.is_packed:
        return page.num_weights(parts, settings) * dtype.itemsize
    return bytes_of(parts, "")


def _is_packed(name: str, checkpoint: Checkpoint) -> bool:
    info = checkpoint.tensors[name]
    return info.dtype in PACKED_DTYPES.values() or is_packed(name, info)


def _tensors(
    checkpoint: Checkpoint, page: Format, settings: Settings, units: list[_Unit], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for unit in units:
        parts = {ending: checkpoint.read(name) for ending, name in unit.parts.items()}
        if not unit.is_packed:
            yield unit.name, parts[""]
            continue
        where = f"{checkpoint.path}: {unit.name}"
        decoded = page.decode(parts, settings, where).to(dtype)
        check_finite(where, decoded)
        yield unit.name, decoded
