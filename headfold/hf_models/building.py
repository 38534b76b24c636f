"""The only place where transformers builds configs and models: whatever it says against one becomes one line."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.reader import Checkpoint
from ..checkpoint.refusals import model_class
from ..core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PRETRAINED = ("ForMaskedLM", "ForPreTraining")
"""Ends of the names of classes whose heads are of no use after pretraining."""
_RENAMED = "_headfold_renamed"
"""Attribute of a model: a checkpoint, and which of its tensors have other names than the model's parameters."""
_NEEDS = re.compile(r"(\w+) requires the ([\w-]+) library")
"""How transformers says that a package is not installed, before it says at length where to find it."""
_PACKAGES = {"PIL": "pillow"}
"""Packages that it calls otherwise than the registry, capitals apart."""
_LONGEST = 300
"""Characters of what a library says that a line quotes."""
_MORE = 2
"""A model may be so many times as large as its checkpoint (tied or derived weights) …"""
_MORE_ELEMENTS = 2**26
"""… and have so many numbers besides: masks of attention that some classes keep."""


def one_line(error: Exception) -> str:
    """Return what an error of a library says, in one line that every terminal and file takes: it may quote half of a surrogate pair."""
    said = str(error).encode(errors="backslashreplace").decode()
    return (" ".join(said.split()) or type(error).__name__)[:_LONGEST]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and loading messages of transformers, and restore its settings afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def library_errors(where: str | Path, what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises into a `UserError`: `where`, `what` does not work, what the library says, what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # corrupt files fail in more ways than libraries have types for
        if isinstance(error, ImportError) and (needs := _NEEDS.search(str(error))):
            package = _PACKAGES.get(needs[2], needs[2].lower())
            raise UserError(
                f"{where}: expected the package {package}, which {needs[1]} needs, got none; pip install {package}"
            ) from error
        raise UserError(f"{where}: {what}: {one_line(error)}{advice and f'; {advice}'}") from error


def is_model_type(model: object) -> bool:
    """Return whether what a user names is a `model_type` of transformers, as in `headfold detect llama`, and no directory here."""
    from transformers import CONFIG_MAPPING

    return str(model) in CONFIG_MAPPING and not Path(str(model)).is_dir()


def open_config(config: Mapping[str, Any], where: str, config_class: Any = None) -> "PreTrainedConfig":
    """Return a config as its class in transformers reads it; `config_class` where it is not that of its `model_type`.

    Raises:
        UserError: transformers has no such class, or the class refuses the config.
    """
    from transformers import CONFIG_MAPPING

    with library_errors(
        where, "transformers cannot build this config", "correct config.json, or save the checkpoint again"
    ):
        return (config_class or CONFIG_MAPPING[config["model_type"]]).from_dict(
            deepcopy(dict(config))
        )  # some classes take fields out of nested ones


def build_model(auto: Any, checkpoint: Checkpoint, **options: Any) -> "PreTrainedModel":
    """Return a model of the class `auto` with weights as that initialises them, on the device and with the initialisation of the context.

    Raises:
        UserError: transformers refuses the config, or the model is larger than its checkpoint.
    """
    where = f"{checkpoint.path}/config.json"
    config = open_config(checkpoint.config, where, getattr(auto, "config_class", None))
    make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    with library_errors(
        checkpoint.path, "transformers cannot build this model", "correct config.json, or save the checkpoint again"
    ):
        return make(config, **options)


def fitting_class(checkpoint: Checkpoint) -> str:
    """Return the name of the class that the tensors fit: the one that the config names or, where that has a head of which there is not one
    tensor, its base model, as sentence-transformers saves it under the name of the class that was pretrained.

    Raises:
        UserError: the config names none, or transformers refuses it.
    """
    import transformers

    name = model_class(checkpoint.config, f"{checkpoint.path}/config.json")
    named = getattr(transformers, name, None)
    if named is None or not name.endswith(_PRETRAINED):
        return name
    prefix = f"{named.base_model_prefix}."
    if any(tensor.startswith(prefix) for tensor in checkpoint.tensors):
        return name
    with torch.device("meta"), quiet():
        model = build_model(named, checkpoint)
    head = [parameter for parameter, _ in model.named_parameters() if not parameter.startswith(prefix)]
    base: Any = transformers.MODEL_MAPPING.get(type(model.config), None)
    if not isinstance(base, type) or any(part in checkpoint.tensors for part in head):
        return name
    return base.__name__


def check_size(auto: Any, checkpoint: Checkpoint) -> None:
    """Check that a model is as large as its checkpoint, before memory is taken for it.

    A wrong size in the config would otherwise be filled with random numbers until the memory is full.

    Raises:
        UserError: a tensor has another shape by the config than in the checkpoint, or the model is much larger.
    """
    with torch.device("meta"):
        model = build_model(auto, checkpoint)
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        info = checkpoint.tensors.get(name_on_disk(name, model, checkpoint) or "")
        # The same sizes in another order are what transformers turns round on loading.
        if info is not None and sorted(info.shape) != sorted(parameter.shape):
            raise UserError(
                f"{checkpoint.path}: {name}: expected shape {tuple(parameter.shape)} by the config, got {info.shape}; "
                "correct the config or the checkpoint"
            )
    needed, stored = sum(part.numel() for part in parts.values()), checkpoint.num_parameters
    if needed > _MORE * stored + _MORE_ELEMENTS:
        name = max(parts, key=lambda part: parts[part].numel())
        raise UserError(
            f"{checkpoint.path}: expected a model about as large as its checkpoint of {stored} numbers, got one of {needed} by the "
            f"config, most of them in {name}, {tuple(parts[name].shape)}; correct the config or the checkpoint"
        )


def name_on_disk(parameter: str, model: "PreTrainedModel", checkpoint: Checkpoint) -> str | None:
    """Return the tensor that a parameter is loaded from: its own, that of a base model (one prefix more or less), or its tied one's; under
    the name that it has in the model, or one that transformers renames to that on loading."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    twins = [source for target, source in tied.items() if target == parameter]
    twins += [target for target, source in tied.items() if source == parameter]
    prefix = f"{model.base_model_prefix}."
    for name in (parameter, *twins):
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in checkpoint.tensors:
                return candidate
    renamed = _renamed_on_loading(model, checkpoint)
    return next((renamed[name] for name in (parameter, *twins) if name in renamed), None)


def _renamed_on_loading(model: "PreTrainedModel", checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return parameter → tensor on disk, where transformers renames a checkpoint's tensors on loading, as those of wrappers.

    Tensors that it also reshapes or joins are left out. The names are kept with the model, which has thousands of parameters.
    """
    found = vars(model).get(_RENAMED)
    if found is None or found[0] is not checkpoint:
        names = _names_in(model, checkpoint.tensors)
        found = vars(model)[_RENAMED] = (checkpoint, {new: old for old, new in names.items()})
    return found[1]


def _names_in(model: "PreTrainedModel", tensors: Iterable[str]) -> dict[str, str]:
    """Return tensor on disk → parameter; tensors that transformers also reshapes or joins are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    names = {name: rename_source_key(name, renamings, converters) for name in tensors}
    return {old: new for old, (new, joined) in names.items() if joined is None}


def names_in_model(config: Mapping[str, Any], tensors: Iterable[str], where: str) -> dict[str, str]:
    """Return tensor → parameter of the model of a config; tensors that transformers also reshapes or joins are left out. There are none
    where transformers lacks the class, as that of a model which brings code.

    Checkpoints and adapters keep the names of the transformers version that wrote them: those of one parameter may differ.

    Raises:
        UserError: transformers cannot build the model.
    """
    import transformers

    if (named := getattr(transformers, model_class(config, where), None)) is None:
        return {}
    opened = open_config(config, where)
    with library_errors(where, "transformers cannot build this model", "correct config.json"), torch.device("meta"):
        return _names_in(named._from_config(opened), tensors)


def check_token_ids(model: "PreTrainedModel", path: Path) -> None:
    """Let the model refuse tokens that its embedding has no row for, wherever they come from: its tokenizer is that of another model."""
    num_tokens = getattr(model.config.get_text_config(), "vocab_size", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == num_tokens and "position" not in name:
            module.register_forward_pre_hook(partial(_check_ids, path))


def _check_ids(path: Path, table: Any, inputs: tuple[Any, ...]) -> None:
    ids = inputs[0]
    # A graph is traced without this; on a GPU the one token of a step of decoding, which the model made itself, is not waited for.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or ids.is_meta
    if traced or (ids.is_cuda and ids.shape[-1] == 1) or not ids.numel():
        return
    least, greatest = (int(number) for number in torch.aminmax(ids))
    if least < 0 or greatest >= table.num_embeddings:
        raise UserError(
            f"{path}: expected tokens from 0 to {table.num_embeddings - 1}, the rows of its embedding, got {least} to {greatest}; "
            "the tokenizer is that of another model: copy the model's own there"
        )
