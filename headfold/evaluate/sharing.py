"""Passes over data that several processes share: each rank runs some of the batches, and every rank gets all results in order."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ..parallel import all_gather, falls_here, on_all

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def run_shared(batches: Iterable[Batch], run: Callable[[Batch], Result]) -> list[Result]:
    """Return `run` of every batch, in the order of the batches, on every rank.

    Batch number n is run by the rank that it falls to, so all ranks must give the same batches. Results must be small, and tensors among
    them must lie in CPU memory. With one process this is a loop.

    Raises:
        UserError: a batch was refused, on any rank.
    """
    return gathered_in_order(
        on_all(lambda: [(number, run(batch)) for number, batch in enumerate(batches) if falls_here(number)])
    )


def gathered_in_order(own: Sequence[tuple[int, Result]]) -> list[Result]:
    """Return the results of all ranks, ordered by the numbers that go with them."""
    numbered = [pair for pairs in all_gather(list(own)) for pair in pairs]
    return [result for _, result in sorted(numbered, key=lambda pair: pair[0])]
