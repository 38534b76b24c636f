"""Refit W_o of every block to the original's output: ridge least squares, shrunk toward the merged W_o.

Minimises Σ ‖y − W a − b‖² + λ ‖W − W_merged‖² over the calibration tokens, y what the original attention answers and a
what the merged heads bring to W_o, both on the original's own inputs. λ is `RIDGE` times the mean energy of a, so that directions the
data hardly show keep the merged weights (never zero). The closed form behind docs/absorb.md, 4; the merged heads' errors add up
across heads in y, which the merge, one group at a time, cannot see.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..calibration import Sample, batches, mask_of, num_tokens
from ..families.spec import Site
from .blocks import calls, twin, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-2
"""λ over the mean energy of the merged heads' outputs."""
PORTION_BYTES = 2**31
"""Of normal equations held at once where blocks cannot be walked one by one."""


@torch.no_grad()
def refit(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Mapping[str, Tensor]],
    sample: Sample,
    *,
    ridge: float = RIDGE,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """New output projections (and their biases, where a site has one) by names on disk, in float32.

    `model` is the original under stock transformers; `merged(site)` gives the site's folded tensors in the original's
    shapes (the head-repeated twin). `progress` hears tokens per site and batch. Decoders of packed text whose class knows K/V
    heads (their blocks take hidden states alone by position) are walked, so that one block is in memory; others are run
    whole, a portion of their sites at a time.
    """
    fitted: dict[str, Tensor] = {}
    every = list(batches(sample))
    if sample.keys() == {"input_ids"} and all(site.native for site in sites):
        for block, visit in walk(model, sites, [batch["input_ids"] for batch in every]):
            weights = merged(block.site)
            solver = _Ridge(twin(block.attention, block.site, weights), block.site)
            for number, batch in enumerate(every):
                (args, kwargs), answer = visit(number)
                solver.add(args, kwargs, answer, None)
                progress(num_tokens(batch))
            fitted |= solver.fitted(weights, ridge)
        return fitted
    for portion in _portions(sites):
        weights = {site.name: merged(site) for site in portion}
        solvers = {s.name: _Ridge(twin(model.get_submodule(s.module), s, weights[s.name]), s) for s in portion}
        for batch in every:
            for site, (args, kwargs), answer in calls(model, portion, batch):
                solvers[site.name].add(args, kwargs, answer, mask_of(site, batch, answer, queries=True))
                progress(num_tokens(batch))
        for name, solver in solvers.items():
            fitted |= solver.fitted(weights[name], ridge)
    return fitted


def _portions(sites: list[Site]) -> Iterator[list[Site]]:
    """As many sites at a time as their normal equations fit into `PORTION_BYTES`."""
    portion: list[Site] = []
    for site in sites:
        portion.append(site)
        if sum((s.num_heads * s.head_dim) ** 2 * 16 for s in portion) > PORTION_BYTES:
            yield portion
            portion = []
    if portion:
        yield portion


class _Ridge:
    """Normal equations of one site, for the change of W_o that explains what the merged heads still miss."""

    def __init__(self, attention: nn.Module, site: Site) -> None:
        self._attention, self._site = attention, site
        self._output = attention.get_submodule(site.paths["o"].removeprefix(f"{site.module}."))
        self._gram: Float[Tensor, "n n"] | None = None
        self._cross: Float[Tensor, "n model"] | None = None

    def add(self, args: tuple, kwargs: dict, answer: Float[Tensor, "*batch model"], mask: Tensor | None) -> None:
        """One batch: the call that the original attention received, and what its output projection answered."""
        seen: list[tuple[Tensor, Tensor]] = []
        handle = self._output.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        self._attention(*args, **kwargs)
        handle.remove()
        heads, merged = (tensor.reshape(-1, tensor.shape[-1]) for tensor in seen[0])
        exact = torch.promote_types(heads.dtype, torch.float32)  # sums in half precision would drown the ridge
        missing = answer.reshape(merged.shape).to(exact) - merged.to(exact)
        heads = heads.to(exact)
        heads = torch.cat([heads, heads.new_ones(len(heads), 1)], 1)
        if mask is not None:
            heads, missing = heads[mask.flatten()], missing[mask.flatten()]
        gram, cross = (heads.T @ heads).double(), (heads.T @ missing).double()
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross

    def fitted(self, weights: Mapping[str, Tensor], ridge: float) -> dict[str, Tensor]:
        """The new projection by name on disk; `weights` has the merged one."""
        name = f"{self._site.weights['o']}"
        has_bias = "o" in self._site.biases
        step = self._step(ridge, intercept=has_bias)
        change = step[:-1] if self._site.transposed else step[:-1].T
        fitted = {f"{name}.weight": (weights[f"{name}.weight"].to(torch.float64) + change).to(torch.float32)}
        if has_bias:
            fitted[f"{name}.bias"] = (weights[f"{name}.bias"].to(torch.float64) + step[-1]).to(torch.float32)
        return fitted

    def _step(self, ridge: float, *, intercept: bool) -> Float[Tensor, "n_plus_1 model"]:
        """The change of [W_o; b_o]; its last row is zero without an intercept."""
        assert self._gram is not None and self._cross is not None
        size = len(self._gram) if intercept else len(self._gram) - 1
        gram = self._gram[:size, :size].clone()
        damping = ridge * gram.diagonal()[: len(self._gram) - 1].mean().clamp_min(torch.finfo(torch.float64).tiny)
        gram.diagonal()[: len(self._gram) - 1] += damping
        step = torch.zeros_like(self._cross)
        step[:size] = torch.linalg.solve(gram, self._cross[:size])
        return step
