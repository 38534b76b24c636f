"""LoRA adapters of peft, read from their files: the config, checked to be one that is merged here, and the tensors by module."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.headers import read_header
from ..checkpoint.refusals import check_finite
from ..core.errors import UserError
from ..core.json_input import read_object
from .pickled import read_pickle

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
"""Fields that are read here, or that matter to training alone. Any other that is set changes what the adapter computes."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take a part of the base away, of which the adapter's files say nothing."""
_MERGE = "merge it with peft (merge_and_unload, then save_pretrained) and fold the result"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter: its config and, by the name of a module or tensor of the base, what it adds there or puts in its place."""

    path: Path
    config: Mapping[str, Any]
    added: Mapping[str, Mapping[str, Tensor]]
    """Module → its low-rank tensors: "A", "B", and "magnitude" where the adapter is a DoRA; "embedding_A", "embedding_B"."""
    replaced: Mapping[str, Tensor]
    """Tensor → what takes its place: biases and modules that were trained whole."""

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of a module's low-rank product."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next((value for key, value in patterns.items() if _names(key, module)), self.config["lora_alpha"])
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)


def _names(pattern: str, module: str) -> bool:
    """Return whether a pattern of the config, an expression for the end of a name, names a module."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def open_adapter(directory: Path) -> Adapter:
    """Read an adapter.

    Raises:
        UserError: files are missing or cannot be read, or the adapter is of a kind that is not merged here.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: expected an adapter of peft, got no {CONFIG}; pass the directory that holds it")
    config = read_object(directory / CONFIG)
    _check(config, directory / CONFIG)
    added: dict[str, dict[str, Tensor]] = {}
    replaced = {}
    for key, tensor in _read(directory).items():
        check_finite(f"{directory}: {key}", tensor)
        name = key.removeprefix(_PREFIX)
        module, part = _split(name)
        if part:
            added.setdefault(module, {})[part] = tensor
        elif "lora_" in name or "token_adapter" in name:
            raise UserError(f"{directory}: expected tensors of a LoRA, got {key:.100}; {_MERGE}")
        else:
            replaced[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = tensor
    if not added and not replaced:
        raise UserError(f"{directory}: expected tensors of a LoRA, got none; save the adapter again")
    adapter = Adapter(directory, config, added, replaced)
    for module, parts in added.items():
        _check_parts(adapter, module, parts)
    return adapter


_PARTS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "embedding_A", ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip


def _split(name: str) -> tuple[str, str]:
    """Return the module of a tensor's name and which part of its LoRA it is; no part where it is none."""
    ending = next((ending for ending in _PARTS if name.endswith(ending)), "")
    return name.removesuffix(ending), _PARTS.get(ending, "")


def _read(directory: Path) -> Mapping[str, Tensor]:
    for name in _WEIGHTS:
        path = directory / name
        if path.is_file() and path.suffix == ".bin":
            return read_pickle(path)
        if path.is_file():
            read_header(path)
            return load_file(path)
    raise UserError(f"{directory}: expected {_WEIGHTS[0]}, got none; save the adapter again")


def _check(config: Mapping[str, Any], where: Path) -> None:
    """Check that an adapter is a LoRA whose product with the base is a sum of matrices.

    Raises:
        UserError: another kind of adapter, or a field that changes what it computes and is not read here.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type: expected LORA, got {kind!r:.40}; {_MERGE}")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(
            f"{where}: lora_alpha: expected a number, got {config.get('lora_alpha')!r:.40}; correct the file"
        )
    for name in ("alpha_pattern", "rank_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"{where}: {name}: expected a JSON object, got {config[name]!r:.40}; correct the file")
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if not isinstance(alpha, int | float) or len(pattern) > 1000 or not _compiles(pattern):
            raise UserError(
                f"{where}: alpha_pattern: expected numbers by name of module, got {alpha!r:.40}; correct the file"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{where}: init_lora_weights: expected a base that is left as it was, got {start!r:.40}; {_MERGE}"
        )
    for name in sorted(config.keys() - _WITHOUT_EFFECT):
        if config[name] not in (None, False, 0, "", [], {}):
            raise UserError(f"{where}: {name}: expected a plain LoRA or DoRA, got {config[name]!r:.60}; {_MERGE}")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _check_parts(adapter: Adapter, module: str, parts: Mapping[str, Tensor]) -> None:
    """Check that a module has both matrices of one rank, and a magnitude where the adapter is a DoRA."""
    where = f"{adapter.path}: {module}"
    down, up = parts.get("A", parts.get("embedding_A")), parts.get("B", parts.get("embedding_B"))
    if down is None or up is None:
        raise UserError(f"{where}: expected lora_A and lora_B, got one of them; save the adapter again")
    if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1] or not len(down):
        raise UserError(
            f"{where}: expected matrices of one rank, got the shapes {tuple(down.shape)} and {tuple(up.shape)}; {_MERGE}"
        )
    if bool(adapter.config.get("use_dora")) != ("magnitude" in parts):
        raise UserError(
            f"{where}: use_dora: expected a magnitude where it is set alone, got another; save the adapter again"
        )
