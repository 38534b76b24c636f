"""Measure a checkpoint on text, alone or beside the one it was folded from."""

from pathlib import Path

from ..checkpoint.hub import resolve
from ..evaluate import perplexity
from .measuring import default_device
from .source import Progress, silent


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | None = None,
    context: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> perplexity.Evaluation:
    """Perplexity of `model` on `text` (default: the bundled held-out text); with `reference`, KL to it and top-1 agreement.

    Raises:
        UserError: a checkpoint or text that cannot be read.
    """
    progress = progress or silent
    progress("evaluate", 0, 1)
    directory = resolve(str(model))
    other = None if reference is None else resolve(str(reference))
    found = perplexity.evaluate(directory, other, text, context=context, device=device or default_device())
    progress("evaluate", 1, 1)
    return found
