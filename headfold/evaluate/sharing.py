"""Passes over data that several processes share: each rank runs some of the batches, and every rank gets all results in order."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ..core.progress import Progress, counter
from ..corpus.samples import Sample, batches
from ..parallel import all_gather, falls_here, on_all

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def run_shared(
    batches: Iterable[Batch], run: Callable[[Batch], Result], finished: Callable[[Batch], None] = lambda batch: None
) -> list[Result]:
    """Return `run` of every batch, in the order of the batches, on every rank.

    Batch number n is run by the rank that it falls to, so all ranks must give the same batches. Results must be small, and tensors among
    them must lie in CPU memory. With one process this is a loop. `finished` is called with each batch that has been run or left to
    another rank.

    Raises:
        UserError: a batch was refused, on any rank.
    """

    def own() -> list[tuple[int, Result]]:
        results = []
        for number, batch in enumerate(batches):
            if falls_here(number):
                results.append((number, run(batch)))
            finished(batch)
        return results

    return gathered_in_order(on_all(own))


def run_on_items(
    sample: Sample | Iterable[Sample], batch_size: int, run: Callable[[Sample], Result], progress: Progress, stage: str
) -> list[Result]:
    """Return `run` of every batch of one sample, or of several that are read as needed; progress counts items in `stage`
    (their total is 0 where it is not known).

    Raises:
        UserError: a batch was refused, on any rank.
    """
    parts, total = ([sample], num_items(sample)) if isinstance(sample, dict) else (sample, 0)
    advance = counter(progress, stage, total)
    return run_shared(
        (batch for part in parts for batch in batches(part, batch_size)), run, lambda batch: advance(num_items(batch))
    )


def num_items(sample: Sample) -> int:
    """Return the number of items of a sample."""
    return len(next(iter(sample.values())))


def gathered_in_order(own: Sequence[tuple[int, Result]]) -> list[Result]:
    """Return the results of all ranks, ordered by the numbers that go with them."""
    numbered = [pair for pairs in all_gather(list(own)) for pair in pairs]
    return [result for _, result in sorted(numbered, key=lambda pair: pair[0])]
