"""Let attention sites of a stock model run other heads, grouped and of any width: to try them before anything is written."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.folded import runtime_entry
from ..families.spec import Site
from .modeling_headfold import config_above, regroup_module


def regrouped(
    root: nn.Module, site: Site, num_kv_heads: int, head_dim_multiple: int, model: PreTrainedModel
) -> nn.Module:
    """The module that holds a site's projections, a copy of `model`'s, given room for these heads, in place."""
    inner = site.core.removeprefix(site.module).removeprefix(".")
    output = site.paths["o"].removeprefix(f"{site.module}.")
    regroup_module(
        root, inner, output, runtime_entry(site, num_kv_heads, None, head_dim_multiple), config_above(model, site.core)
    )
    return root


def local_names(site: Site) -> dict[str, str]:
    """Tensor name on disk, as `write_heads` gives them in slots → name of the parameter below the site's module."""
    named = dict(site.parameters)
    if "qkv" in site.weights:
        for role, name in site.unfused.items():
            named |= {f"{name}.{suffix}": f"{site.core}.{role}_proj.{suffix}" for suffix in ("weight", "bias")}
    return {on_disk: name.removeprefix(f"{site.module}.") for on_disk, name in named.items()}


def install_heads(
    model: PreTrainedModel, site: Site, tensors: Mapping[str, Tensor], num_kv_heads: int, head_dim_multiple: int
) -> nn.Module:
    """Put these tensors (by names on disk, in slots) to work at a site of the model; returns the module that was there."""
    parent, _, leaf = site.module.rpartition(".")
    holder = model.get_submodule(parent)
    before = getattr(holder, leaf)
    module = regrouped(copy.deepcopy(before), site, num_kv_heads, head_dim_multiple, model)
    parameters, names = dict(module.named_parameters()), local_names(site)
    for name, tensor in tensors.items():
        parameters[names[name]].data = tensor.to(parameters[names[name]])
    setattr(holder, leaf, module.train(before.training))
    return before


@contextmanager
def installed_heads(
    model: PreTrainedModel, clothes: Iterable[tuple[Site, Mapping[str, Tensor], int, int]]
) -> Iterator[None]:
    """`install_heads` at several sites, and everything back in its place afterwards."""
    undone = []
    try:
        for site, *rest in clothes:
            undone.append((site, install_heads(model, site, *rest)))
        yield
    finally:
        for site, before in undone:
            parent, _, leaf = site.module.rpartition(".")
            setattr(model.get_submodule(parent), leaf, before)
