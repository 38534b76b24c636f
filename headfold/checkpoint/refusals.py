"""Checkpoints that cannot be folded, recognised by file names, config and dtypes: adapters, pickles, quantised weights, remote
code."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import SourceError, UserError
from ..core.json_input import read_object
from .entries import WEIGHTS, check_entries
from .headers import TensorInfo

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_LANGUAGE_MODEL = "AutoModelForCausalLM"
_REFERENCE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*ForCausalLM")
"""A file and a class in it."""
TRUST = "read it, then pass --trust-remote-code to headfold detect, inspect, calibrate, fold, eval, compare or run"
"""What to do about a checkpoint that brings code."""
NO_CODE = "headfold check, export and bench take classes of transformers alone; transformers opens it with trust_remote_code=True"
"""The same for verbs that cannot run such code."""


def refuse_source(path: Path) -> None:
    """Refuse a directory whose file names show that it is not a checkpoint that headfold reads.

    Raises:
        UserError: no directory, an empty one, an adapter, no config.json, no safetensors weights; else as `check_entries`.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: expected a checkpoint directory, got {'a file' if path.exists() else 'nothing there'}; check the path"
        )
    names = {entry.name for entry in path.iterdir()}
    if not names:
        raise UserError(f"{path}: the directory is empty; expected config.json and safetensors weights; check the path")
    weights = names & {*WEIGHTS}
    if "adapter_config.json" in names and not weights:
        raise UserError(
            f"{path}: an adapter without its model; expected full weights; name its base and merge it on the way: "
            f"headfold fold {_base_of(path)} OUT --adapter {path}"
        )
    if "config.json" not in names:
        raise UserError(f"{path}: no config.json; expected a checkpoint as transformers saves it; check the path")
    if not weights:
        raise UserError(f"{path}: {_why_no_weights(names)}")
    check_entries(path)


def _base_of(adapter: Path) -> str:
    """Return the model that an adapter says it was made for; BASE where it names none."""
    try:
        named = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    except UserError:
        named = None
    return shlex.quote(named) if isinstance(named, str) and named else "BASE"


def _why_no_weights(names: set[str]) -> str:
    expected = "expected model.safetensors or model.safetensors.index.json"
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        return (
            f"{expected}, got pickled weights ({pickled[0]}), which can run code when opened; convert them with transformers: "
            "from_pretrained(...).save_pretrained(DIR, safe_serialization=True)"
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        return f"{expected}, got {others[0]}; add the index that lists the shards, or rename a single file to model.safetensors"
    return f"{expected}, got no weights; download the checkpoint again"


def model_class(config: Mapping[str, Any], where: str) -> str:
    """Return the name of the class that saved the weights.

    Raises:
        UserError: the config does not say it.
    """
    named = config.get("architectures")
    if not named:
        raise UserError(
            f"{where}: architectures: expected the class of transformers that saved the weights, got none; add it, as in "
            '"architectures": ["BertForMaskedLM"]'
        )
    return str(named[0])


def refuse_packed(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse quantised weights, as heads of a packed matrix cannot be averaged, and other weights than those that are read here.

    Raises:
        UserError: a quantisation config, matrices of integers that are named as weights, or another file that the config names.
    """
    if (named := config.get("transformers_weights")) not in (None, *WEIGHTS):
        raise UserError(
            f"{path / 'config.json'}: transformers_weights: expected no other weights than {WEIGHTS[0]}, got {named!r:.60}; "
            "remove the field"
        )
    for method in _quantisations(config):
        raise UserError(
            f"{path / 'config.json'}: quantised ({method}); expected bf16, fp16, fp32 or fp64; start from the original"
        )
    for name, info in tensors.items():
        if is_packed(name, info):
            dtype = str(info.dtype).removeprefix("torch.")
            raise UserError(
                f"{path / info.shard}: {name} holds packed {dtype} weights; expected floats; start from the original"
            )


def _quantisations(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the method of each quantisation config, of the model or of a part of it."""
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            yield str(value.get("quant_method", key)) if isinstance(value, dict) else key
        elif isinstance(value, dict):
            yield from _quantisations(value)


def is_packed(name: str, info: TensorInfo) -> bool:
    """Return whether a tensor holds weights packed into integers, by its name, dtype and axes."""
    # Integer and boolean buffers (masks, position ids) are no weights, and are copied like anything else.
    integer = not (info.dtype.is_floating_point or info.dtype.is_complex or info.dtype is torch.bool)
    return integer and len(info.shape) >= 2 and "weight" in name.rpartition(".")[2]


def class_reference(config: Mapping[str, Any], where: str) -> str:
    """Return the file without its ending and the class, as in "modeling_mine.MineForCausalLM", that a config names for language models.

    Raises:
        UserError: it names none, or one that does not lie beside it, such as a class in another repository of the hub.
    """
    named = (config.get("auto_map") or {}).get(_LANGUAGE_MODEL)
    if not isinstance(named, str) or not _REFERENCE.fullmatch(named):
        raise UserError(
            f"{where}: auto_map: expected a {_LANGUAGE_MODEL} in a file beside it, such as modeling_mine.MineForCausalLM, got "
            f"{named!r:.60}; headfold runs no other code of a checkpoint"
        )
    return named


def why_remote_code(config: Mapping[str, Any], advice: str = TRUST) -> str:
    """Return why a config whose class comes with code of its own is refused: file, class and what to do."""
    named = config["auto_map"]
    reference = str(named.get(_LANGUAGE_MODEL) or next(iter(named.values()), "")) if isinstance(named, dict) else ""
    file, _, name = reference.rpartition(".")
    return (
        f"model_type {config.get('model_type')!r:.60} runs its own code (auto_map), class {name!r:.60} of {f'{file}.py'!r:.60}, which "
        f"headfold does not run unasked; {advice}"
    )


def refuse_remote_code(config: Mapping[str, Any], where: str = "config.json", advice: str = TRUST) -> None:
    """Refuse a config that brings its own modelling code; call it if `model_type` is unknown.

    Raises:
        UserError: the config has an `auto_map`.
    """
    if config.get("auto_map"):
        raise UserError(f"{where}: {why_remote_code(config, advice)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, which would spread through every mean and decomposition.

    Raises:
        SourceError: names the tensor and the number of such elements.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise SourceError(
            f"{name}: {bad} of {tensor.numel()} elements are NaN or infinite; expected finite weights; repair the source"
        )
