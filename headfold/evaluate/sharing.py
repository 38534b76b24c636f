"""Passes over items that several processes share (`parallel.run_shared`)."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..core.progress import Progress, counter
from ..corpus.samples import Sample, batches
from ..parallel import run_shared

Result = TypeVar("Result")


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
