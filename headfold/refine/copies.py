"""Windows that repeat what they began with, by which training keeps a fold able to find something again in a long text.

Most text asks this of attention only now and then. A fold that is trained on it alone predicts it well, and no longer finds a number that
was said thousands of tokens before. So some windows come a second time, with spans of their first half in place of the second. What is
right there is known to the original from the first half alone.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

_T = TypeVar("_T")

EVERY = 4
"""One batch in so many comes a second time. Each of them costs a step that no text is learnt from."""
SPANS = (8, 64)
"""Tokens of the spans, at least and at most: some begin and end often, others have to be followed for long."""


def repeated(items: Iterable[_T]) -> Iterator[_T]:
    """Yield items, one in `EVERY` twice."""
    for number, item in enumerate(items, 1):
        yield item
        if number % EVERY == 0:
            yield item


def is_second(number: int) -> bool:
    """Return whether what `repeated` yields with this number is there for the second time."""
    return number % (EVERY + 1) == EVERY


def with_copies(windows: Int[Tensor, "window position"], generator: torch.Generator) -> Int[Tensor, "window position"]:
    """Return the windows with spans of their first half, from random places, in their second half."""
    found, half = windows.clone(), max(1, windows.shape[1] // 2)
    for row, source in zip(found, windows, strict=True):
        at = half
        while at < len(row):
            count = min(int(torch.randint(SPANS[0], SPANS[1] + 1, (), generator=generator)), half, len(row) - at)
            first = int(torch.randint(0, half - count + 1, (), generator=generator))
            row[at : at + count] = source[first : first + count]
            at += count
    return found
