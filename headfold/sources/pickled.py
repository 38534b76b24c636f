"""Weights that torch.save pickled: read as tensors alone, so that nothing in the file is run."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import check_layers, read_config
from ..checkpoint.refusals import check_finite
from ..core.errors import UserError
from ..core.json_input import read_object
from .weights import Weights

PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The weights of a checkpoint as transformers saved them before safetensors: one file, or the index of several."""


def open_pickled(directory: Path) -> Weights:
    """Return the weights of a checkpoint of .bin files.

    Raises:
        UserError: a file is missing or corrupt, or holds other things than tensors.
    """
    config = read_config(directory)
    files = _files(directory)
    # Opened once before anything is written: mapped, so that this reads the names alone.
    shapes = {name: tensor for path in files for name, tensor in read_pickle(path).items()}
    check_layers(config, len(shapes), str(directory))
    return Weights(
        config=config,
        names=tuple(shapes),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in shapes.values()),
        tensors=lambda: _tensors(files),
        beside=directory,
        origin="pickled weights, read without running what else they hold",
        quantised=False,
    )


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        for name, tensor in read_pickle(path).items():
            check_finite(f"{path}: {name}", tensor)
            yield name, tensor


def _files(directory: Path) -> list[Path]:
    single, index = (directory / name for name in PICKLED)
    if single.is_file():
        return [single]
    listed = read_object(index).get("weight_map")
    names = listed.values() if isinstance(listed, dict) and listed else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(
            f"{index}: expected a weight_map from tensor names to files beside it, got none; download it again"
        )
    files = [directory / str(name) for name in sorted({str(name) for name in names})]
    absent = [path for path in files if not path.is_file()]
    if absent:
        raise UserError(
            f"{index}: names files that are missing: {absent[0].name}; download or copy the checkpoint again"
        )
    return files


def read_pickle(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, mapped into memory where the file is a zip archive.

    Raises:
        UserError: the file is corrupt, or holds other things than tensors.
    """
    is_archive = zipfile.is_zipfile(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: expected pickled tensors alone, got something else, which could run code when opened ({_said(error)}); use "
            "safetensors, or convert the file where you trust it"
        ) from error
    except Exception as error:  # corrupt archives fail in more ways than torch has types for
        raise UserError(f"{path}: torch cannot read it ({_said(error)}); download or copy it again") from error
    tensors = found if isinstance(found, dict) else {}
    if not tensors or not all(isinstance(name, str) and _is_plain(value) for name, value in tensors.items()):
        raise UserError(
            f"{path}: expected a dictionary of names and tensors, got {type(found).__name__} of other things; save the state_dict alone"
        )
    return tensors


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _said(error: Exception) -> str:
    """Return the part of torch's message that says what it met."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")
    return (named or type(error).__name__)[:160]
