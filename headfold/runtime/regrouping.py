"""Installs other heads at attention sites of a model in memory, with any number of K/V heads and any head_dim multiple."""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.folded import runtime_entry
from ..families.spec import Site
from .modeling_headfold import config_above, own_forward, regroup_module


def regrouped(
    root: nn.Module, site: Site, num_kv_heads: int, head_dim_multiple: int, model: PreTrainedModel
) -> nn.Module:
    """Resize a module that holds a site's projections, a copy of `model`'s, for these heads in place, and return it."""
    inner = site.core.removeprefix(site.module).removeprefix(".")
    output = site.paths["o"].removeprefix(f"{site.module}.")
    regroup_module(
        root, inner, output, runtime_entry(site, num_kv_heads, None, head_dim_multiple), config_above(model, site.core)
    )
    return root


def ask_transformers(root: nn.Module, site: Site) -> None:
    """Give a copy of a module that computes attention by itself a forward that asks transformers for it, unless its projection is fused."""
    core: Any = root.get_submodule(site.core.removeprefix(site.module).removeprefix("."))
    alone = "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(core).__module__])
    if alone and "qkv" not in site.paths and own_forward(type(core)) is not None:
        inner = site.core.removeprefix(site.module).removeprefix(".")
        regroup_module(root, inner, None, runtime_entry(site, site.num_kv_heads), SimpleNamespace())
        core.config._attn_implementation = "sdpa"


def model_names(site: Site) -> dict[str, str]:
    """Return the parameter name in the model for each tensor name on disk, as `write_heads` gives them in slots."""
    named = dict(site.parameters)
    if "qkv" in site.weights:
        for role, name in site.unfused.items():
            named |= {f"{name}.{suffix}": f"{site.core}.{role}_proj.{suffix}" for suffix in ("weight", "bias")}
    return named


def local_names(site: Site) -> dict[str, str]:
    """Return those names below the site's module. A table that the stack shares lies elsewhere and is not among them."""
    inside = f"{site.module}."
    return {d: name.removeprefix(inside) for d, name in model_names(site).items() if name.startswith(inside)}


def input_modules(site: Site, *, in_slots: bool) -> dict[str, str]:
    """Return the modules of a model whose inputs are those of the projections `q`, `v` (and `k`) and `o`; `in_slots`: as installed."""
    fused = "" if in_slots else site.paths.get("qkv", "")
    return {role: site.paths.get(role) or fused or f"{site.core}.{role}_proj" for role in ("q", "v", "o")}


def shared_tensors(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return by their names in the model those tensors (by names on disk) that lie outside of the site's module."""
    inside, names = local_names(site), model_names(site)
    return {names[on_disk]: tensor for on_disk, tensor in tensors.items() if on_disk not in inside}


def install_heads(
    model: PreTrainedModel, site: Site, tensors: Mapping[str, Tensor], num_kv_heads: int, head_dim_multiple: int
) -> nn.Module:
    """Install these tensors (by names on disk, in slots) at a site of the model, not shared ones, and return the module that was there."""
    parent, _, leaf = site.module.rpartition(".")
    holder = model.get_submodule(parent)
    before = getattr(holder, leaf)
    module = regrouped(copy.deepcopy(before), site, num_kv_heads, head_dim_multiple, model)
    parameters, names = dict(module.named_parameters()), local_names(site)
    for name in tensors.keys() & names.keys():
        parameters[names[name]].data = tensors[name].to(parameters[names[name]])
    setattr(holder, leaf, module.train(before.training))
    return before


@contextmanager
def installed_heads(
    model: PreTrainedModel, replacements: Iterable[tuple[Site, Mapping[str, Tensor], int, int]]
) -> Iterator[None]:
    """Return a context in which `install_heads` is done at several sites, given as (site, tensors, K/V heads, head_dim multiple), and what
    they share is replaced too.
    """
    replaced: list[tuple[Site, nn.Module]] = []
    shared: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for site, tensors, num_kv_heads, head_dim_multiple in replacements:
            for name, tensor in shared_tensors(site, tensors).items():
                parameter = model.get_parameter(name)
                shared.append((parameter, parameter.data))
                parameter.data = tensor.to(parameter)
            replaced.append((site, install_heads(model, site, tensors, num_kv_heads, head_dim_multiple)))
        yield
    finally:
        for site, before in replaced:
            parent, _, leaf = site.module.rpartition(".")
            setattr(model.get_submodule(parent), leaf, before)
        for parameter, data in shared:
            parameter.data = data
