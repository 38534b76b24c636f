"""One door to all that can be measured: one model, or several on the same data, on data of their kind or on tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..evaluate.perplexity import Evaluation
from . import contrasting, scoring, tasking
from .contrasting import Contrast
from .scoring import Scores
from .source import Progress
from .tasking import TaskScores

OF_TASKS = ("num_fewshot", "include_path")
"""Options of tasks alone."""
OF_DATA = ("text", "metric", "columns", "context", "beams", "max_new_tokens")
"""Options of data alone."""
OF_INTERVALS = ("resamples", "seed")
"""Options of comparisons and tasks alone."""


def evaluate(
    model: str | Path,
    *,
    compare: Sequence[str | Path] = (),
    reference: str | Path | None = None,
    text: str | None = None,
    metric: str | None = None,
    columns: Sequence[str] | None = None,
    context: int | None = None,
    beams: int | None = None,
    max_new_tokens: int | None = None,
    task: str | Sequence[str] | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    resamples: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Evaluation | Scores | TaskScores | Contrast:
    """Measure `model`: on data of its kind (`scoring.evaluate`), or on a `task` of lm-evaluation-harness (`tasking.evaluate_tasks`).

    With `compare`, other models are measured on the same, with intervals of their differences to `model` (`contrasting.contrast`,
    `tasking.contrast_tasks`). Options mean what they mean there, and have the defaults of there where they are None.

    Raises:
        UserError: an option of another of these, and what they refuse.
    """
    given = {name: value for name, value in locals().items() if name in OPTIONS and value is not None}
    if task is not None:
        _refuse(given, OF_DATA, "beside --task")
        names = [task] if isinstance(task, str) else list(task)
        run = tasking.contrast_tasks if compare else tasking.evaluate_tasks
        return run([model, *compare] if compare else model, names, **given)
    _refuse(given, OF_TASKS, "without --task NAME")
    if compare:
        return contrasting.contrast([model, *compare], **given)
    _refuse(given, OF_INTERVALS, "without --compare or --task")
    return scoring.evaluate(model, **given)


OPTIONS = (*OF_TASKS, *OF_DATA, *OF_INTERVALS, "reference", "limit", "device", "progress")


def _refuse(given: Mapping[str, Any], options: Sequence[str], where: str) -> None:
    for name in options:
        if name in given:
            raise UserError(f"eval: --{name.replace('_', '-')} means nothing {where}; leave it out")


def facts(found: Evaluation | Scores | TaskScores | Contrast) -> Any:
    """The machines' form: a list of rows of a comparison, else one object."""
    return found.to_json() if isinstance(found, Contrast | TaskScores) else scoring.facts(found)
