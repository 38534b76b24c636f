"""Refits W_o by ridge regression on the outputs of the merged heads.

Minimises Σ ‖y − W a − b‖² + λ ‖W − W_before‖² over the calibration tokens, where y is the output of the original's attention and a
the input of W_o with the merged heads. λ is `ridge` times the mean energy of a, so that in directions with little data the weights
stay as they were (and do not become zero). The normal equations are summed in float64, over all ranks.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.heads import Heads
from ..core.products import self_product
from ..core.shared import used
from ..parallel import all_reduce
from .recorded import RecordedSite


@torch.no_grad()
def refit_output(site_calls: RecordedSite, heads: Heads, ridge: float) -> Heads:
    """Return the heads with a new `o`, and a new `o_bias` where the site has one."""
    weights = _weights(heads).double()
    size, model = weights.shape
    gram, cross = (torch.zeros(size, n, dtype=torch.float64, device=weights.device) for n in (size, model))
    for number in site_calls.numbers:
        inputs = site_calls.output_inputs(heads, number)
        a = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        gram += self_product(a).double()
        cross += (a.T @ site_calls.target(number)).double()
    gram, cross = all_reduce(gram), all_reduce(cross)
    cross -= gram @ weights  # Σ a ŷᵀ, without another product for every position
    step = _solved(gram, cross, ridge, intercept=heads.o_bias is not None).to(heads.o)
    o = heads.o + step[:-1].reshape(heads.o.shape)
    return replace(heads, o=o, o_bias=None if heads.o_bias is None else heads.o_bias + step[-1])


def _weights(heads: Heads) -> Float[Tensor, "n_plus_1 model"]:
    """Return [W_o; b_o], with zeros for a bias that is not there."""
    bias = heads.o.new_zeros(heads.o.shape[-1]) if heads.o_bias is None else heads.o_bias
    return torch.cat([heads.o.flatten(0, -2), bias[None]])


def _solved(
    gram: Float[Tensor, "n_plus_1 n_plus_1"], cross: Float[Tensor, "n_plus_1 model"], ridge: float, *, intercept: bool
) -> Float[Tensor, "n_plus_1 model"]:
    """Return the change of [W_o; b_o]. Its last row has no ridge, and is zero without an intercept."""
    gram = gram.clone()
    energies = gram.diagonal()[:-1]
    energies += ridge * used(energies.mean())
    size = len(gram) if intercept else len(gram) - 1
    step = torch.zeros_like(cross)
    step[:size] = torch.linalg.solve(gram[:size, :size], cross[:size])
    return step
