"""Run the model over calibration tokens and sum what each attention site sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .core.errors import UserError
from .core.stats import SiteStats
from .families.spec import Site
from .measure import second_moment
from .stock import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_BATCH = 4096
"""Large enough that the D² conversion of each batch's product to float64 is small beside the product itself."""


def batches(windows: Int[Tensor, "window context"]) -> Iterator[Int[Tensor, "batch context"]]:
    """Windows in batches of about `TOKENS_PER_BATCH` tokens."""
    return iter(windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])))


@torch.no_grad()
def collect(
    model: "PreTrainedModel",
    sites: list[Site],
    windows: Int[Tensor, "window context"],
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, SiteStats]:
    """Statistics of every site from one pass over `windows` (token ids), without the output head.

    `progress` is called with the number of tokens of each finished batch.
    """
    sums: dict[str, SiteStats] = {}

    def observer(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            seen = SiteStats(second_moment.observe(x), x.shape[0] * x.shape[1])
            if name in sums:
                for key, tensor in sums[name].tensors.items():
                    tensor += seen.tensors[key]
                seen = SiteStats(sums[name].tensors, sums[name].count + seen.count)
            sums[name] = seen

        return observe

    with _pre_hooks({key_module(site): observer(site.name) for site in sites}, model):
        for batch in batches(windows):
            model.base_model(input_ids=batch.to(input_device(model)), use_cache=False)
            progress(batch.numel())
    for name, stats in sums.items():
        if not all(torch.isfinite(t).all() for t in stats.tensors.values()):
            raise UserError(
                f"{name}: activations are not finite on calibration text; does the source have NaN weights?"
            )
    return sums


def key_module(site: Site) -> str:
    """Path of the linear that makes K: its input is what K and V are functions of."""
    return site.weights.get("k") or site.weights["qkv"]


@contextmanager
def _pre_hooks(hooks: dict[str, Callable[..., None]], model: nn.Module) -> Iterator[None]:
    handles = [model.get_submodule(path).register_forward_pre_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
