"""Refits W_v of the shared heads by least squares on the attended values, with attention weights and W_o fixed.

With fixed attention weights a block's output is linear in W_v: y = Σ_h W_o,h W_v,g(h) z_h, where z_h are the attended inputs of head h.
A merge, which does not see attention weights, weights all inputs equally; this weights them as the model does. Minimises
Σ ‖y − ŷ‖² + λ ‖W_v − W_before‖²_M by preconditioned conjugate gradients on the normal equations (Hestenes & Stiefel 1952); each step is
one forward and one backward pass of the block alone. M is the same quadratic form for equally attended inputs,
Σ_h W_oᵀ W_o ⊗ Σ x xᵀ: it is the preconditioner and the norm of the ridge. The steps are few, as directions with little data come last.
The gradient is that of all data; the curvature along a direction, which says how far to go, is measured on a part of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.heads import Heads
from ..core.products import self_product
from ..descent.kronecker import damped, inverse
from ..parallel import all_reduce, on_main
from .recorded import RecordedSite

_DAMPING = 1e-3
"""Added to both factors of M, relative to their mean energy."""
_CURVATURE_EVERY = 5
"""Batches per batch that the curvature is measured on: a number that does not divide the usual numbers of processes, which take turns."""
_POSITIONS_PER_DIM = 8
"""Positions per input dim that such a part must have, else all data are used: what the part has not seen has no curvature there, and
steps along it would be far too long.
"""


def curvature_batches(total: int) -> range:
    """Return the numbers of the batches, of `total`, on which the curvature is measured where there are enough data."""
    return range(0, total, max(1, min(_CURVATURE_EVERY, total // 2)))


Rows = Float[Tensor, "group dim size"]


def refit_values(site_calls: RecordedSite, heads: Heads, ridge: float, steps: int) -> Heads:
    """Return the heads with another `v`; its bias column stays as it is where the site has none."""
    size = heads.v.shape[2] if {"v", "qkv"} & set(site_calls.site.biases) else heads.v.shape[2] - 1
    second = torch.zeros(size, size, dtype=torch.float64, device=heads.v.device)
    start = heads.v[..., :size]
    slope, positions = _gradient(site_calls, heads, start, to_target=True, numbers=site_calls.numbers, moments=second)
    rest = -slope
    measure, precondition = _measure(heads, all_reduce(second))
    blank = heads.o_bias if heads.o_bias is None else torch.zeros_like(heads.o_bias)
    linear = replace(heads, o_bias=blank)  # without what does not depend on V
    change = torch.zeros_like(start)
    calls = site_calls.all_numbers
    seen = [calls[index] for index in curvature_batches(len(calls))]
    if float(positions) * len(seen) / len(calls) < _POSITIONS_PER_DIM * size:
        seen = list(calls)
    part = [number for number in site_calls.numbers if number in seen]
    energy, direction = None, torch.zeros_like(change)
    for _ in range(steps):
        preconditioned = precondition(rest)
        before, energy = energy, (rest * preconditioned).sum()
        direction = preconditioned if before is None else preconditioned + energy / before * direction
        image, measured = _gradient(site_calls, linear, direction, to_target=False, numbers=part)
        image = image * (positions / measured).to(image) + ridge * measure(direction)
        curvature = (direction * image).sum()
        if on_main(partial(_is_flat, curvature)):  # nothing left to gain: a perfect fold, or all V zero
            break
        change += energy / curvature * direction
        rest -= energy / curvature * image
    return replace(heads, v=_with(heads.v, start + change))


def _is_flat(curvature: Tensor) -> bool:
    return not curvature > 0


def _with(v: Tensor, rows: Rows) -> Tensor:
    """Return v with its first columns replaced."""
    return torch.cat([rows, v[..., rows.shape[2] :]], 2)


def _gradient(
    site_calls: RecordedSite,
    heads: Heads,
    rows: Rows,
    *,
    to_target: bool,
    numbers: Iterable[int],
    moments: Float[Tensor, "size size"] | None = None,
) -> tuple[Rows, Float[Tensor, ""]]:
    """Return the gradient of ½ Σ ‖ŷ − y‖² with respect to the values at `rows`, and the number of positions; sums over all ranks.

    y = 0 unless `to_target`, and then the values are `rows` alone. Adds Σ x xᵀ of this rank's inputs x = [inputs, 1] (its first
    columns) to `moments`.
    """
    leaf = rows.clone().requires_grad_()
    total = torch.zeros_like(rows)
    positions = torch.zeros((), dtype=torch.float64, device=rows.device)
    for number in numbers:
        with torch.enable_grad():
            v = _with(heads.v if to_target else torch.zeros_like(heads.v), leaf)
            replay = site_calls.run(replace(heads, v=v), number)
            missing = replay.output - replay.target if to_target else replay.output
            total += torch.autograd.grad(0.5 * missing.square().sum(), leaf)[0]
        positions += len(missing)
        if moments is not None:
            x = torch.cat([replay.value_inputs, replay.value_inputs.new_ones(len(replay.value_inputs), 1)], 1)[
                :, : len(moments)
            ]
            moments += self_product(x).double()
    return all_reduce(total), all_reduce(positions)


def _measure(heads: Heads, second: Tensor) -> tuple[Callable[[Rows], Rows], Callable[[Rows], Rows]]:
    """Return M and its inverse as functions of rows of the values; `second` is Σ x xᵀ."""
    second = damped(second, _DAMPING)
    own = (heads.o @ heads.o.mT).double()
    readers = torch.tensor(heads.groups.group_of_head, device=own.device)
    read = damped(torch.stack([own[readers == group].sum(0) for group in range(heads.num_kv_heads)]), _DAMPING)

    def measure(rows: Rows) -> Rows:
        return (read @ rows.double() @ second).to(rows.dtype)

    return measure, inverse(read, second)
