"""Trains the projections of folded sites by Adam, and keeps the weights with the least error on data that is held back, so that training
never leaves a fold worse there than it was.

A training that sees its data once takes its steps in white coordinates (`whitened.py`), in which few steps go far. In a long one these
follow what is particular to the data, and Adam's own coordinates end lower.
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..families.spec import Site
from ..parallel import all_reduce, world_size
from .moments import Moments
from .whitened import WhitenedAdam

HELD_BACK = 8
"""One batch in so many is held back, where the data are seen more than once."""
HELD_BACK_ONCE = 2 * HELD_BACK
"""And where they are seen once."""
MAX_ERROR_RATIO = 2
"""A check may find up to so many times the least error: between checks steps are still long, and their noise falls as they get
shorter. Backing off at every check without improvement ends at a larger loss increase.
"""
LATE = 0.75
"""Share of the steps after which a check without improvement backs off: the remaining steps would not improve either."""
BACK_OFF = 4
"""Backing off means to continue from the best weights with steps so many times smaller."""
WARM_UP = 5
"""Steps over which the rate rises from 0."""
NUM_FIRST = 6
"""Rounds whose gradients make the first step, whose length sets the rate."""
NUM_SEARCHED = 2
"""Held-back batches on which that length is searched."""
TRIED = 2.0**-9
"""The length that is tried first, in root mean squares of a projection's white weights."""
USUAL_TRIES, MAX_TRIES = 4, 12


TRAINED = ("q", "k", "v", "o")
"""What is trained of a site; with `o` its bias, if it has one."""


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """The weights of one site that are trained, by field."""

    heads: Heads
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, heads: Heads, site: Site, fields: Container[str] = TRAINED) -> "TrainedWeights":
        """Return those weights of these heads. A bias column that the checkpoint has no tensor for stays as it is."""
        biased = "qkv" in site.biases
        tensors = {"o": heads.o} if "o" in fields else {}
        for field in ("q", "k", "v"):
            whole = getattr(heads, field)
            tensors[field] = whole if biased or field in site.biases else whole[..., :-1]
        if heads.o_bias is not None and "o" in fields:
            tensors["o_bias"] = heads.o_bias
        return cls(heads, {name: t.detach().clone().requires_grad_() for name, t in tensors.items()})

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
        """Return a copy of the present weights, of all fields."""
        found = FittedHeads.of(self.to_heads())
        return replace(found, **{name: tensor.detach().clone() for name, tensor in found.to_tensors().items()})


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a training: each sees the batches of one of the `rounds`, one per rank, drawn in an order given by the seed."""

    rounds: Sequence[range]
    held: range
    """Numbers of the batches that are held back."""
    steps: int
    num_checks: int
    """Number of times that the error on the held-back data is computed."""
    rate: float | None
    """Length of the steps at an error of 1, in root mean squares of the weights. It is proportional to the root of the error, as weights
    that are nearly right need smaller steps: at a small error a fixed step ends above the error it began with, or is too slow at a large
    one. None: `longer` times the length of the first step (`_first_step`).
    """
    longer: float
    """Length of the steps in lengths of the first, where `rate` is None."""
    seed: int

    def orders(self) -> Iterator[range]:
        """Yield all rounds in random order, again and again, for so many steps; the same on all ranks."""
        generator = torch.Generator().manual_seed(self.seed)
        left: list[range] = []
        for _ in range(self.steps):
            left = left or [self.rounds[at] for at in torch.randperm(len(self.rounds), generator=generator).tolist()]
            yield left.pop()


def schedule(
    counts: Sequence[int], tokens: int, *, num_checks: int, seed: int, rate: float | None = None, longer: float = 1.0
) -> Schedule:
    """Return the schedule of a training on `tokens` tokens over all ranks; `counts` are the tokens of each batch."""
    train, held = _split(counts, tokens)
    rounds = [train[at : at + world_size()] for at in range(0, len(train), world_size())]
    steps = max(1, round(tokens * len(counts) / sum(counts) * (len(rounds) / len(train))))
    return Schedule(rounds, held, steps, num_checks, rate, longer, seed)


def total_tokens(counts: Sequence[int], tokens: int, num_checks: int, *, searched: bool = False) -> int:
    """Return the number of tokens that such a training runs on, with the check at its start and the `num_checks` others, and as a rule
    with the search for the length of its first step, if there is one.
    """
    _, held = _split(counts, tokens)
    checked = (num_checks + 1) * sum(counts[number] for number in held)
    return tokens + checked + searched * USUAL_TRIES * sum(counts[number] for number in held[:NUM_SEARCHED])


def num_with_held(tokens: int) -> float:
    """Return the number of tokens of which so many are left for one pass, when others are held back."""
    return tokens * HELD_BACK_ONCE / (HELD_BACK_ONCE - 1)


def _split(counts: Sequence[int], tokens: int) -> tuple[range, range]:
    """Return the numbers of the batches for training and for checks; a single batch is used for both."""
    count = len(counts)
    if count == 1:
        return range(1), range(1)
    held = max(1, count // (HELD_BACK if tokens > sum(counts) else HELD_BACK_ONCE))
    return range(count - held), range(count - held, count)


class NotFinite(UserError):
    """Raised where training begins with heads that overflow."""


def descend(
    weights: Sequence[TrainedWeights],
    moments: Callable[[], Sequence[Moments]] | None,
    error: Callable[[range], float],
    gradients: Callable[[range], Sequence[Tensor]],
    plan: Schedule,
) -> list[FittedHeads]:
    """Return the weights with the least error on the held-back batches, those at the start among them.

    `moments` returns those of each of the `weights`, in whose white coordinates steps are taken; None for Adam's own. `error` returns the
    error over the batches of these numbers, of all ranks. `gradients` returns this rank's part of the gradients of all tensors of all
    weights, in their order, from the batches of these numbers; the parts of all ranks add up.

    Raises:
        NotFinite: the error is not finite at the start.
    """
    best, found = error(plan.held), [each.fitted() for each in weights]
    if not math.isfinite(best):
        raise NotFinite(f"fold: expected a finite error to begin with, got {best}; give --dtype float32")
    if best <= 0:  # a perfect fold
        return found
    inputs = moments() if moments else [{}] * len(weights)
    if not all(_are_finite([*each.values()]) for each in inputs):
        return found
    adam = WhitenedAdam([(each.tensors, own) for each, own in zip(weights, inputs, strict=True)])
    del inputs
    orders, steps = plan.orders(), plan.steps
    if plan.rate is None:
        first = [*islice(orders, max(1, min(NUM_FIRST, steps // 4)))]
        steps -= len(first)
        for numbers in first:
            if not _are_finite(seen := _all_reduced(gradients(numbers))):
                return found
            adam.see(seen, evenly=True)
        rate = plan.longer * _first_step(adam, partial(error, plan.held[:NUM_SEARCHED]))
        if moments is None:  # one pass over the data does not see these gradients again
            adam.forget()
        if not rate:
            return found
    else:
        rate = plan.rate * best**0.5
    checks = {round(steps * (check + 1) / plan.num_checks) for check in range(plan.num_checks)}
    for step, numbers in enumerate(orders):
        if not _are_finite(seen := _all_reduced(gradients(numbers))):  # all ranks see the same
            rate = _back_off(adam, weights, found, rate)
            continue
        adam.see(seen)
        adam.step(rate * (1 - step / steps) * min(1.0, (step + 1) / WARM_UP))
        if step + 1 in checks:
            present = error(plan.held)
            if present < best:
                best, found = present, [each.fitted() for each in weights]
            elif not present <= MAX_ERROR_RATIO * best or step + 1 >= LATE * steps:
                rate = _back_off(adam, weights, found, rate)
    return found


def _back_off(
    adam: WhitenedAdam, weights: Sequence[TrainedWeights], found: Sequence[FittedHeads], rate: float
) -> float:
    """Go back to the best weights, and return the rate from there on."""
    for each, fitted in zip(weights, found, strict=True):
        each.set(fitted)
    adam.forget()
    return rate / BACK_OFF


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _first_step(adam: WhitenedAdam, error: Callable[[], float]) -> float:
    """Take the step that decreases the error most, along the direction of the gradients so far, and return its length.

    How long steps may be differs by a factor of ten between models, and nothing that is known without trying tells it.
    """
    start, directions = adam.weights(), adam.directions()

    def go(length: float) -> None:
        adam.set([before - length * along for before, along in zip(start, directions, strict=True)])

    def error_at(length: float) -> float:
        go(length)
        return error()

    length = _least(error_at)
    go(length)
    return length


def _least(error_at: Callable[[float], float]) -> float:
    """Return the length with the least error, by a parabola through 0, a length that decreases it, and twice that, which does not
    decrease it further; 0 if no length that is tried decreases it.
    """
    length, start = TRIED, error_at(0.0)
    here, beyond = error_at(length), error_at(2 * length)
    for _ in range(MAX_TRIES):
        if beyond < here < start:
            length, here, beyond = 2 * length, beyond, error_at(4 * length)
        elif not here < start:
            length, here, beyond = length / 2, error_at(length / 2), here
        else:
            bend = start + beyond - 2 * here
            return length * (bend + 2 * (start - here)) / (2 * bend) if math.isfinite(bend) else length / 2
    return length if here < start else 0.0


def _all_reduced(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over all ranks, in one message."""
    if world_size() == 1:
        return list(tensors)
    flat = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
