"""Heals every block: trains its four projections alone, by gradient, to reproduce the output of the original's attention.

Minimises Σ ‖y − ŷ‖² / Σ ‖y‖² over the calibration tokens on W_q, W_k, W_v and W_o together (`descent`), starting from the merged
and refitted heads. There is no pass through the whole model: one block is trained at a time, in some hundred steps. With several ranks,
each takes one batch of every step and its share of the held-back data, so a step sees as many batches as there are ranks, and fewer
steps train a block with the same number of tokens.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration import Sample, batches_in_order, num_tokens
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..descent.descend import TRAINED, Schedule, TrainedWeights, descend, schedule, total_tokens
from ..descent.moments import Moments, add_moments, empty_moments, num_wanted
from ..families.spec import Site
from ..parallel import all_reduce, world_size
from .fitting import Solver, fit
from .recorded import RecordedSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 2**19
"""Tokens that every block is trained with, repeated where the sample has fewer."""
ITEMS = {"images": 2**14, "audio": 2**12, "sound": 2**12}
"""Items that every block is trained with where data has no tokens. A window of sound has many times the positions of an image."""
BATCH_TOKENS = 2048
NUM_CHECKS = 8
SCALE = 2.0**12
"""What the error is multiplied by on the way back in float16, in which small gradients would be zero."""
RATE = 0.2


def heal(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Heads],
    sample: Sample,
    *,
    tokens: int = TOKENS,
    rate: float = RATE,
    seed: int = 0,
    **how: Any,
) -> dict[str, FittedHeads]:
    """Return the healed heads of every site: `q`, `k`, `v`, `o`, and `o_bias` where there is one; float32.

    Every block is trained with `tokens` tokens of `sample` (items where it has none), over all ranks together. `model`, `sites`,
    `merged` and `how` are those of `fitting.fit`.
    """
    all_batches = _batches(sample)
    counts = [*map(num_tokens, all_batches)]

    def solve(site_calls: RecordedSite, heads: Heads) -> FittedHeads:
        return trained(site_calls, heads, schedule(counts, tokens, num_checks=NUM_CHECKS, seed=seed, rate=rate))

    return fit(model, sites, merged, all_batches, Solver(solve, tokens_per_block(sample, tokens)), **how)


def tokens_per_block(sample: Sample, tokens: int) -> int:
    """Return the number of tokens that one block is run on, in training and in checks."""
    return total_tokens([*map(num_tokens, _batches(sample))], tokens, NUM_CHECKS)


def _batches(sample: Sample) -> list[Sample]:
    return list(batches_in_order(sample, BATCH_TOKENS))


def trained(
    site_calls: RecordedSite,
    heads: Heads,
    plan: Schedule,
    *,
    fields: Container[str] = TRAINED,
    whitens: bool = False,
) -> FittedHeads:
    """Return the heads with the least error on the held-back calls, those of `fields` trained. The plan numbers calls in their order."""
    weights = TrainedWeights.of(heads, site_calls.site, fields)
    positions, energy = _positions_and_energy(site_calls)

    def error(numbers: range) -> float:
        return _error(site_calls, weights.to_heads(), numbers)

    def gradients(numbers: range) -> Sequence[Tensor]:
        return _gradients(site_calls, weights, numbers, energy * sum(positions[number] for number in numbers))

    def moments() -> Sequence[Moments]:
        return [_input_moments(site_calls, heads)]

    (found,) = descend([weights], moments if whitens else None, error, gradients, plan)
    return found


@torch.no_grad()
def _input_moments(site_calls: RecordedSite, heads: Heads) -> Moments:
    """Return the second moments of the inputs of the projections, from as many calls as that takes."""
    sums = empty_moments(heads)
    wanted = num_wanted(sums) / world_size()
    for number in site_calls.numbers:
        replay = site_calls.run(heads, number)
        for field, inputs in (("q", replay.query_inputs), ("v", replay.value_inputs), ("o", replay.inputs)):
            add_moments(sums, field, inputs)
        wanted -= len(replay.inputs)
        if wanted <= 0:
            break
    return {field: all_reduce(total) for field, total in sums.items()}


def _gradients(site_calls: RecordedSite, weights: TrainedWeights, numbers: range, energy: float) -> Sequence[Tensor]:
    """Return the gradients of Σ ‖y − ŷ‖² / `energy` over the batches of these numbers; zeros on a rank that has none of them."""
    tensors = list(weights.tensors.values())
    total = [torch.zeros_like(tensor) for tensor in tensors]
    scale = SCALE if site_calls.dtype == torch.float16 else 1.0
    for number in _on_this_rank(site_calls, numbers):
        with torch.enable_grad():
            replay = site_calls.run(weights.to_heads(), number)
            loss = (replay.output - replay.target).square().sum() * (scale / energy)
            found = torch.autograd.grad(loss, tensors)
        total = [before + each / scale for before, each in zip(total, found, strict=True)]
    return total


def _on_this_rank(site_calls: RecordedSite, numbers: range) -> Iterator[int]:
    return (number for number in (site_calls.all_numbers[each] for each in numbers) if number in site_calls.numbers)


def _positions_and_energy(site_calls: RecordedSite) -> tuple[list[int], float]:
    """Return the positions of each of the calls of all ranks, and the mean of ‖y‖² over all of them."""
    positions, total = [0.0] * len(site_calls.all_numbers), 0.0
    for number in site_calls.numbers:
        target = site_calls.target(number)
        positions[site_calls.all_numbers.index(number)] = len(target)
        total += float(target.square().sum(dtype=torch.float64))
    *counts, total = all_reduce(torch.tensor([*positions, total], dtype=torch.float64)).tolist()
    return [int(each) for each in counts], max(total / int(sum(counts)), torch.finfo(torch.float32).tiny)


def _error(site_calls: RecordedSite, heads: Heads, numbers: range) -> float:
    """Return Σ ‖y − ŷ‖² / Σ ‖y‖² over these batches."""
    missing = energy = 0.0
    for number in _on_this_rank(site_calls, numbers):
        replay = site_calls.run(heads, number)
        missing += float((replay.output - replay.target).square().sum(dtype=torch.float64))
        energy += float(replay.target.square().sum(dtype=torch.float64))
    missing, energy = all_reduce(torch.tensor([missing, energy], dtype=torch.float64)).tolist()
    return missing / max(energy, torch.finfo(torch.float32).tiny)
