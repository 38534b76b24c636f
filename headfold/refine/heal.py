"""Heals every block: trains its four projections alone, by gradient, to reproduce the output of the original's attention.

Minimises Σ ‖y − ŷ‖² / Σ ‖y‖² over the calibration tokens by Adam (Kingma & Ba 2015, 1412.6980) on W_q, W_k, W_v and W_o together,
starting from the merged and refitted heads. There is no pass through the whole model: one block is trained at a time, in some
hundred steps. An eighth of the data is held back, and the heads with the least error on it are kept, so that a healed block is
never worse than before. With several ranks, each takes one batch of every step and its share of the held-back data, so a step sees
as many batches as there are ranks, and fewer steps train a block with the same number of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration import Sample, batches, num_tokens
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..families.spec import Site
from ..parallel import all_reduce, world_size
from .fitting import Solver, fit
from .recorded import RecordedSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 2**19
"""Tokens that every block is trained with, repeated where the sample has fewer."""
ITEMS = {"images": 2**14, "audio": 2**12}
"""Items that every block is trained with where data has no tokens. A window of sound has many times the positions of an image."""
BATCH_TOKENS = 2048
HELD_BACK = 8
"""One batch in so many is held back."""
NUM_CHECKS = 8
"""Number of times that the error on the held-back data is computed."""
MAX_ERROR_RATIO = 2
"""A check may find up to so many times the least error: between checks steps are still long, and their noise falls as they get
shorter. Backing off at every check without improvement ends at a larger loss increase.
"""
LATE = 0.75
"""Share of the steps after which a check without improvement backs off: the remaining steps would not improve either."""
BACK_OFF = 4
"""Backing off means to continue from the best heads with steps so many times smaller."""
RATE = 0.2
"""Adam's step in root mean squares of a projection's weights, at an error of 1. It is proportional to the root of the error, as
weights that are nearly right need smaller steps: at a small error a fixed step ends above the error it began with, or is too slow at
a large one.
"""
WARM_UP = 5
"""Steps over which the rate rises from 0."""
BETAS = (0.9, 0.95)
FIELDS = ("q", "k", "v", "o")


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
    train, held = _split(len(all_batches))
    rounds = [train[at : at + world_size()] for at in range(0, len(train), world_size())]
    steps = max(1, round(tokens * len(all_batches) / sum(map(num_tokens, all_batches)) * (len(rounds) / len(train))))
    solver = Solver(
        partial(_healed, rounds=rounds, held=held, steps=steps, rate=rate, seed=seed), tokens_per_block(sample, tokens)
    )
    return fit(model, sites, merged, all_batches, solver, **how)


def tokens_per_block(sample: Sample, tokens: int) -> int:
    """Return the number of tokens that one block is run on, in training and in checks."""
    all_batches = _batches(sample)
    _, held = _split(len(all_batches))
    return tokens + (NUM_CHECKS + 1) * sum(num_tokens(all_batches[number]) for number in held)


def _batches(sample: Sample) -> list[Sample]:
    return list(batches(sample, BATCH_TOKENS))


@dataclass(frozen=True, slots=True)
class _TrainedWeights:
    """The weights that are trained, by field, and how far a step moves each at rate 1."""

    heads: Heads
    tensors: dict[str, Tensor]
    scales: dict[str, float]

    @classmethod
    def of(cls, heads: Heads, site: Site) -> "_TrainedWeights":
        """Return the weights of these heads. A bias column that the checkpoint has no tensor for stays as it is."""
        biased = "qkv" in site.biases
        tensors = {"o": heads.o}
        for field in ("q", "k", "v"):
            whole = getattr(heads, field)
            tensors[field] = whole if biased or field in site.biases else whole[..., :-1]
        if heads.o_bias is not None:
            tensors["o_bias"] = heads.o_bias
        leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        scales = {name: _root_mean_square(t) for name, t in tensors.items()}
        return cls(heads, leaves, scales | ({"o_bias": scales["o"]} if "o_bias" in scales else {}))

    def to_heads(self) -> Heads:
        """Return the heads with the present weights."""
        changed: dict[str, Any] = {name: self._whole(name, tensor) for name, tensor in self.tensors.items()}
        return replace(self.heads, **changed)

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        before = getattr(self.heads, name)
        return tensor if tensor.shape == before.shape else torch.cat([tensor, before[..., -1:]], -1)

    def set(self, fitted: FittedHeads) -> None:
        """Set the weights to those of fitted heads."""
        for name, leaf in self.tensors.items():
            before = getattr(fitted, name)
            leaf.data.copy_(before if leaf.shape == before.shape else before[..., :-1])

    def fitted(self) -> FittedHeads:
        """Return a copy of the present weights."""
        return FittedHeads(
            **{name: self._whole(name, tensor).detach().clone() for name, tensor in self.tensors.items()}
        )


def _healed(
    site_calls: RecordedSite, heads: Heads, *, rounds: list[range], held: range, steps: int, rate: float, seed: int
) -> FittedHeads:
    """Return the heads with the least error on the held-back batches. A step sees the batches of one of the `rounds`, one per rank."""
    weights = _TrainedWeights.of(heads, site_calls.site)
    positions, energy = _positions_and_energy(site_calls, held.stop)
    best, found = _error(site_calls, weights.to_heads(), held), weights.fitted()
    if not best > 0:  # a perfect fold
        return found
    rate *= best**0.5
    optimizer = torch.optim.Adam(
        [{"params": [tensor], "lr": 0.0, "scale": weights.scales[name]} for name, tensor in weights.tensors.items()],
        betas=BETAS,
    )
    checks = {round(steps * (check + 1) / NUM_CHECKS) for check in range(NUM_CHECKS)}
    for step, numbers in enumerate(_shuffled(rounds, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"] * (1 - step / steps) * min(1.0, (step + 1) / WARM_UP)
        _step(site_calls, weights, optimizer, numbers, energy * sum(positions[number] for number in numbers))
        if step + 1 in checks:
            error = _error(site_calls, weights.to_heads(), held)
            if error < best:
                best, found = error, weights.fitted()
            elif not error <= MAX_ERROR_RATIO * best or step + 1 >= LATE * steps:
                weights.set(found)
                optimizer.state.clear()
                rate /= BACK_OFF
    return found


def _split(count: int) -> tuple[range, range]:
    """Return the numbers of the batches for training and for checks; a single batch is used for both."""
    if count == 1:
        return range(1), range(1)
    held = max(1, count // HELD_BACK)
    return range(count - held), range(count - held, count)


def _shuffled(rounds: Sequence[range], steps: int, seed: int) -> Iterator[range]:
    """Yield all rounds in random order, again and again, for so many steps; the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    left: list[range] = []
    for _ in range(steps):
        left = left or [rounds[at] for at in torch.randperm(len(rounds), generator=generator).tolist()]
        yield left.pop()


def _step(
    site_calls: RecordedSite, weights: _TrainedWeights, optimizer: torch.optim.Optimizer, numbers: range, energy: float
) -> None:
    """Take one step on Σ ‖y − ŷ‖² / `energy` over the batches of these numbers; a rank that has none of them adds no gradient."""
    tensors = list(weights.tensors.values())
    gradients = [torch.zeros_like(tensor) for tensor in tensors]
    for number in _on_this_rank(site_calls, numbers):
        with torch.enable_grad():
            replay = site_calls.run(weights.to_heads(), number)
            loss = (replay.output - replay.target).square().sum() / energy
            gradients = list(torch.autograd.grad(loss, tensors))
    for leaf, gradient in zip(tensors, _all_reduced(gradients), strict=True):
        leaf.grad = gradient
    optimizer.step()


def _all_reduced(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over all ranks, in one message."""
    if world_size() == 1:
        return list(tensors)
    flat = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _on_this_rank(site_calls: RecordedSite, numbers: range) -> Iterator[int]:
    return (number for number in numbers if number in site_calls.numbers)


def _positions_and_energy(site_calls: RecordedSite, count: int) -> tuple[list[int], float]:
    """Return the positions of each of the `count` batches of all ranks, and the mean of ‖y‖² over all of them."""
    positions, total = [0.0] * count, 0.0
    for number in site_calls.numbers:
        target = site_calls.target(number)
        positions[number], total = len(target), total + float(target.square().sum(dtype=torch.float64))
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


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
