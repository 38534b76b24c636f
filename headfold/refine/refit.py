"""Refit W_o of every block to the original's output: ridge least squares, shrunk toward the merged W_o.

Minimises Σ ‖y − W a − b‖² + λ ‖W − W_merged‖² over the calibration tokens, y what the original attention answers and a
what the merged heads bring to W_o, both on the original's own inputs. λ is `RIDGE` times the mean energy of a, so that directions the
data hardly show keep the merged weights (never zero). The closed form behind docs/absorb.md, 4; the merged heads' errors add up
across heads in y, which the merge, one group at a time, cannot see.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..families.spec import Site
from .blocks import twin, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-2
"""λ over the mean energy of the merged heads' outputs."""


@torch.no_grad()
def refit(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Mapping[str, Tensor]],
    windows: list[Int[Tensor, "batch token"]],
    *,
    ridge: float = RIDGE,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """New output projections (and their biases, where a site has one) by names on disk, in float32.

    `model` is the original under stock transformers; `merged(site)` gives the site's folded tensors in the original's
    shapes (the head-repeated twin). `progress` hears tokens per site and batch.
    """
    fitted: dict[str, Tensor] = {}
    for block, visit in walk(model, sites, windows):
        weights = merged(block.site)
        output = f"{block.site.weights['o']}.weight"
        solver = _Ridge(twin(block.attention, block.site, weights), block.site)
        for number, batch in enumerate(windows):
            (args, kwargs), answer = visit(number)
            solver.add(args, kwargs, answer)
            progress(batch.numel())
        bias = f"{block.site.weights['o']}.bias" if "o" in block.site.biases else None
        step = solver.step(ridge, intercept=bias is not None)
        fitted[output] = (weights[output].to(torch.float64) + step[:-1].T).to(torch.float32)
        if bias is not None:
            fitted[bias] = (weights[bias].to(torch.float64) + step[-1]).to(torch.float32)
    return fitted


class _Ridge:
    """Normal equations of one site, for the change of W_o that explains what the merged heads still miss."""

    def __init__(self, attention: nn.Module, site: Site) -> None:
        self._attention = attention
        path = site.weights["o"].removeprefix(f"{site.module}.")
        self._output = attention.get_submodule(path)
        self._gram: Float[Tensor, "n n"] | None = None
        self._cross: Float[Tensor, "n model"] | None = None

    def add(self, args: tuple, kwargs: dict, answer: Float[Tensor, "batch token model"]) -> None:
        """One batch: the call that the original attention received, and its answer."""
        seen: list[Tensor] = []
        handle = self._output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        merged = self._attention(*args, **kwargs)
        handle.remove()
        merged = merged[0] if isinstance(merged, tuple) else merged
        heads = seen[0].reshape(-1, seen[0].shape[-1])
        heads = torch.cat([heads, heads.new_ones(len(heads), 1)], 1)
        missing = (answer - merged).reshape(len(heads), -1)
        gram, cross = (heads.T @ heads).double(), (heads.T @ missing).double()
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross

    def step(self, ridge: float, *, intercept: bool) -> Float[Tensor, "n_plus_1 model"]:
        """The change of [W_o; b_o]; its last row is zero without an intercept."""
        assert self._gram is not None and self._cross is not None
        size = len(self._gram) if intercept else len(self._gram) - 1
        gram = self._gram[:size, :size].clone()
        damping = ridge * gram.diagonal()[: len(self._gram) - 1].mean().clamp_min(torch.finfo(torch.float64).tiny)
        gram.diagonal()[: len(self._gram) - 1] += damping
        step = torch.zeros_like(self._cross)
        step[:size] = torch.linalg.solve(gram, self._cross[:size])
        return step
