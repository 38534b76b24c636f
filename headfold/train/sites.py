"""The grouped attention modules of a model in memory, and which parameters are trained."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..core.errors import UserError
from ..families.wrapped import is_in_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scope = Literal["attention", "all", "lora"]
SCOPES: tuple[Scope, ...] = ("attention", "all", "lora")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "q_norm", "k_norm")
"""Names that stock classes with K/V heads give to the modules that make queries, keys and values."""
LORA_RANK = 16
"""Default rank of LoRA."""


@dataclass(frozen=True, slots=True)
class SitePaths:
    """The path of the module that holds all projections of one attention site, and the path of its output projection."""

    module: str
    output: str


def find_sites(model: nn.Module, *, towers: bool = False) -> list[SitePaths]:
    """Return the attention modules with grouped heads, of headfold's runtime or of a stock class that counts K/V heads.

    Those in the tower of a wrapper are among them only if `towers` is set, as text does not pass them.

    Raises:
        UserError: there are none.
    """
    found = [_attention(model, path, site) for path, site in _cores(model, towers=towers)]
    if not found:
        raise UserError(
            f"{type(model).__name__}: expected attention with grouped heads, found none; fold the model first"
        )
    return found


def _cores(model: nn.Module, *, towers: bool) -> Iterator[tuple[str, set[str]]]:
    """Yield the path of every module that holds q, k and v, with the names of these in it; of a tower only those that were folded."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for path, module in model.named_modules():
        site = getattr(module, "headfold_site", None)
        if not is_in_language_model(model_type, path) and not (towers and site is not None):
            continue
        if site is not None:
            yield path, {site[role] for role in "qkv" if role in site}
        elif isinstance(getattr(module, "num_key_value_groups", None), int) and _linears(module):
            yield path, set(PROJECTIONS)


def _attention(model: nn.Module, core: str, inputs: set[str]) -> SitePaths:
    """Return the paths of one site. The output projection is the last linear that makes no heads, in the core or in a module around it
    (BERT, ViT).
    """
    path = core
    while path:
        own = [name for name in _linears(model.get_submodule(path)) if name.rpartition(".")[2] not in inputs]
        if own:
            return SitePaths(path, f"{path}.{own[-1]}")
        path = path.rpartition(".")[0]
    raise AssertionError(f"{core}: no output projection")


def _linears(module: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))]


def set_trainable(model: "PreTrainedModel", scope: Scope, rank: int = LORA_RANK, *, towers: bool = False) -> Any:
    """Return the model with gradients enabled for `scope` only: the attention modules, all parameters, or low-rank updates of the
    attention modules (LoRA, 2106.09685; needs `peft`). `towers` as in `find_sites`.

    Raises:
        UserError: an unknown scope, no grouped attention module, or peft is not installed.
    """
    if scope not in SCOPES:
        raise UserError(f"--train {scope}: expected one of {', '.join(SCOPES)}")
    modules = [] if scope == "all" else [site.module for site in find_sites(model, towers=towers)]
    if scope == "lora":
        return _with_lora(model, modules, rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scope == "all" or any(name.startswith(f"{module}.") for module in modules))
    return model


def _with_lora(model: "PreTrainedModel", modules: list[str], rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--train lora: needs the package peft; pip install headfold[train]") from error
    targets = [f"{module}.{name}" for module in modules for name in _linears(model.get_submodule(module))]
    with (
        warnings.catch_warnings()
    ):  # on names of transformers that are on their way out, and on GPT-2's layout, which it then sees to
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def merge_adapters(model: Any) -> "PreTrainedModel":
    """Return the ordinary model, with low-rank updates added to its weights where it has any."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
