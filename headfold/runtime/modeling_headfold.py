"""transformers models with grouped K/V heads in classes that know no count of them: `Grouped<AnyStockClass>`.

The sites, and how many heads each has, are listed in the config under `headfold`.
"""

import copy
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .attention import NAME, implementation, register

IN_PACKAGE = __name__.startswith("headfold.")
"""Otherwise this is the text that lies beside a checkpoint's weights."""
STACKS = {"encoder", "decoder", "text_model", "vision_model"}
"""Parts that some classes of a model lack."""
HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
"""The attributes in which stock attention classes keep head_dim."""
KV_COUNTS = ("num_key_value_heads", "num_kv_heads")
"""The attributes in which some of them keep the number of K/V heads."""

register(replace=IN_PACKAGE)


def regroup(model: PreTrainedModel, sites: Iterable[Mapping[str, Any]]) -> PreTrainedModel:
    """Give the attention sites of a model, in place, the K/V heads that are listed; the weights of new linears are to be loaded.

    A site names its `module`, the linears `q`, `k` and `v` in it, `heads`, `kv_heads` and `head_dim`; with `fused`, the stock
    projection that the three replace; with `k_norm`, the norm over all K heads; with `kv_of_query`, groups that are not equal;
    with `slots`, heads with that many times the head_dim, and the output projection `o`. Sites of a stack that the class lacks
    (the decoder of an encoder) are passed over.

    Raises:
        ValueError: a site that the model should have and has not.
    """
    for site in sites:
        path = _find(model, site["module"])
        if path is not None:
            output = _find(model, site["o"]) if "o" in site else None
            regroup_module(model, path, output, site, config_above(model, path))
    return model


def regroup_module(root: nn.Module, path: str, output: str | None, site: Mapping[str, Any], config: Any) -> None:
    """Regroup one site below any module; `output` is the path of its output projection where that gets more inputs."""
    module = root.get_submodule(path)
    _reproject(module, site)
    if output is not None:
        _reproject_output(root, output, site["heads"] * site.get("slots", 1) * site["head_dim"])
    _attach(module, site, config)


def _find(model: PreTrainedModel, path: str) -> str | None:
    """Return the path in this class: with a head or without it, one prefix more or less; None where the class lacks the stack."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if candidate in modules:
            return candidate
    parts = {part for name in modules for part in name.split(".")}
    if STACKS & set(path.split(".")) - parts:
        return None
    raise ValueError(
        f"{type(model).__name__}: config.headfold: expected a module {path}, found none; is it of this class?"
    )


def config_above(model: PreTrainedModel, path: str) -> Any:
    """Return the config of the innermost model around a module."""
    around = [model, *(model.get_submodule(path[:end]) for end, sign in enumerate(path) if sign == ".")]
    return next(module.config for module in reversed(around) if isinstance(module, PreTrainedModel))


def _reproject(module: nn.Module, site: Mapping[str, Any]) -> None:
    """Replace the linears by ones of the listed sizes; one that has its size already stays, weights and all."""
    fused = module.get_submodule(site["fused"]) if "fused" in site else None
    for role in "qkv":
        rows = site["heads" if role == "q" else "kv_heads"] * site.get("slots", 1) * site["head_dim"]
        parent, _, leaf = site[role].rpartition(".")
        holder = module.get_submodule(parent)
        stock = getattr(holder, leaf, fused)
        if stock is fused or _num_rows(stock) != rows:
            setattr(holder, leaf, _linear_like(stock, rows))
    if "k_norm" in site:
        norm: Any = module.get_submodule(site["k_norm"])
        size = site["kv_heads"] * site["head_dim"]
        if norm.weight.numel() != size:
            norm.weight = nn.Parameter(norm.weight.new_ones(size), requires_grad=norm.weight.requires_grad)
    if fused is not None:
        parent, _, leaf = site["fused"].rpartition(".")
        holder = module.get_submodule(parent)
        delattr(holder, leaf)
        setattr(holder, leaf, NoProjection())


class NoProjection:
    """What a fused projection leaves behind: a name without parameters, since some classes initialise it by name."""

    def __init__(self) -> None:
        self.weight, self.bias = torch.empty(0), None


def _reproject_output(root: nn.Module, path: str, columns: int) -> None:
    """Replace an output projection, linear or Conv1D, by one with `columns` inputs, unless it has as many."""
    parent, _, leaf = path.rpartition(".")
    holder = root.get_submodule(parent)
    stock = getattr(holder, leaf)
    is_linear = isinstance(stock, nn.Linear)
    if stock.weight.shape[1 if is_linear else 0] == columns:
        return
    outputs = stock.weight.shape[0 if is_linear else 1]
    weight = stock.weight.new_empty((outputs, columns) if is_linear else (columns, outputs))
    enlarged = copy.deepcopy(stock)
    enlarged.weight = nn.Parameter(weight, requires_grad=stock.weight.requires_grad)
    setattr(enlarged, "in_features" if is_linear else "nx", columns)
    setattr(holder, leaf, enlarged)


def _num_rows(linear: Any) -> int:
    return linear.out_features if isinstance(linear, nn.Linear) else linear.weight.shape[1]


def _linear_like(stock: Any, rows: int) -> nn.Linear:
    """Return a linear with as many inputs as `stock`, a linear or Conv1D, and with a bias if that has one."""
    weight = stock.weight
    inputs = stock.in_features if isinstance(stock, nn.Linear) else weight.shape[0]
    linear = nn.Linear(inputs, rows, bias=stock.bias is not None, device=weight.device, dtype=weight.dtype)
    return linear.train(stock.training).requires_grad_(weight.requires_grad)


def _attach(module: Any, site: Mapping[str, Any], config: Any) -> None:
    """Set the groups of a module, and give it a forward that heeds them where the stock one does not."""
    uneven, slots = site.get("kv_of_query"), site.get("slots", 1)
    special = bool(uneven) or slots > 1
    module.headfold_site = dict(site)
    module.kv_of_query = None if uneven is None else tuple(uneven)
    module.headfold_slots, module.headfold_scale = slots, site.get("scale", 1.0)
    module.num_key_value_groups = 1 if special else site["heads"] // site["kv_heads"]
    sizes = dict.fromkeys(HEAD_DIMS, site["head_dim"]) | dict.fromkeys(KV_COUNTS, site["kv_heads"])
    for name in sizes.keys() & vars(module).keys():
        setattr(module, name, sizes[name])
    attention: type = type(module)
    forward = own_forward(attention)
    if forward is not None:
        module.__class__ = _with_forward(attention, forward)
        module.config = getattr(module, "config", config)
    elif special or (site["kv_heads"] < site["heads"] and not _repeats_itself(attention)):
        module.config = SiteConfig(module.config, special=special)


def _repeats_itself(attention: type) -> bool:
    """Return whether the eager attention beside a stock class heeds `num_key_value_groups`."""
    return "repeat_kv" in vars(sys.modules[attention.__module__])


def own_forward(attention: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the forward on the page of the class's model type; None where the stock forward takes any number of K/V heads."""
    for base in attention.__mro__:
        page = base.__module__.removeprefix("transformers.models.").partition(".")[0]
        found = globals().get(f"{page}_forward")
        if found is None and IN_PACKAGE and importlib.util.find_spec(f"{__package__}.forwards.{page}"):
            found = getattr(importlib.import_module(f"{__package__}.forwards.{page}"), f"{page}_forward")
        if found is not None and _needs(found) <= inspect.signature(attention.forward).parameters.keys():
            return found
    return None


def _needs(forward: Callable[..., Any]) -> set[str]:
    """Return the inputs that a page's forward cannot do without; a class that lacks one is another attention of the same file."""
    return {name for name, one in inspect.signature(forward).parameters.items() if one.default is one.empty} - {
        "keywords"
    }


@functools.cache
def _with_forward(attention: type, forward: Callable[..., Any]) -> type:
    return type(f"Grouped{attention.__name__}", (attention,), {"forward": forward, "__module__": __name__})


class SiteConfig:
    """A config as a grouped site reads it: all but the attention implementation is the model's, now and later."""

    def __init__(self, config: Any, *, special: bool) -> None:
        self.__dict__.update(_config=config, _special=special)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_special"):
            raise AttributeError(name)
        return getattr(self._config, name)

    @property
    def _attn_implementation(self) -> str:
        return implementation(self._config._attn_implementation, special=self._special)


class GroupedModel(PreTrainedModel):
    """The base of all grouped classes, in front of a stock class."""

    def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
        _open_tables(type(self))
        super().__init__(config, *arguments, **keywords)
        listed = getattr(config, "headfold", None)
        if not listed:
            raise ValueError(f"{type(self).__name__}: config: expected grouped sites under headfold, found none")
        regroup(self, listed["sites"])

    def save_pretrained(self, save_directory: Any, *arguments: Any, **keywords: Any) -> None:
        """Save as the stock class does, and the code beside the weights."""
        super().save_pretrained(save_directory, *arguments, **keywords)
        for name, text in _own_files(self.config.to_dict()).items():
            (Path(save_directory) / name).write_text(text)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: otherwise transformers would take the class for another architecture, and rename no tensors on loading."""
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: the code is saved, and the config's `auto_map` kept, without it."""


def _own_files(config: Mapping[str, Any]) -> dict[str, str]:
    if IN_PACKAGE:
        return importlib.import_module(f"{__package__}.remote").remote_files(config)
    return {Path(__file__).name: Path(__file__).read_text()}


def _open_tables(model: type) -> None:
    """Enter our attention in the tables from which some models choose a class by its name: the eager class, whose forward is then ours."""
    for base in model.__mro__:
        for name, table in vars(sys.modules[base.__module__]).items():
            if name.endswith("_ATTENTION_CLASSES"):
                table.setdefault(NAME, table["eager"])


@functools.cache
def grouped_class(name: str) -> type[PreTrainedModel]:
    """Return the grouped class of a stock one by its name, which it keeps: transformers renames tensors, and saves, by class name.

    Raises:
        AttributeError: transformers has no model class of that name.
    """
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"transformers {transformers.__version__} has no model class {name}")
    own = {"__module__": __name__, "__qualname__": f"Grouped{name}", "__doc__": stock.__doc__}
    return type(name, (GroupedModel, stock), own)


def __getattr__(name: str) -> Any:
    if name.startswith("Grouped"):
        return grouped_class(name.removeprefix("Grouped"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
