"""Models on tasks of lm-evaluation-harness: one, beside its original, or several with intervals of their differences."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.config import read_config
from ..core.errors import UserError
from ..core.progress import Progress
from ..corpus.samples import kind_of
from ..hf_models import compute_dtype, open_tokenizer, stored_dtype
from ..metrics.bootstrap import LEVEL, interval
from ..parallel import on_all
from . import tasks as harness
from .paired import PairedComparison, check_several, paired_comparison
from .perplexity import open_language_model
from .tasks import TaskUnits

KINDS = ("text", "pairs")
"""Kinds of models that tasks are for."""


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """The tasks to run and their settings. `num_fewshot` examples go before each item (None: the task's own number)."""

    names: Sequence[str]
    num_fewshot: int | None = None
    include_path: str | Path | None = None
    """A folder with task files."""
    limit: int | None = None
    """Items of each task."""
    device: str = "cpu"
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One metric of one task: the value with its bootstrap interval, and the reference's value where there is one."""

    task: str
    metric: str
    num_fewshot: int | None
    num_items: int
    value: float
    low: float
    high: float
    reference: float | None
    lower_is_better: bool


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """The scores of a model on tasks, and those of its reference."""

    model: str
    reference: str | None
    limit: int | None
    resamples: int
    seed: int
    level: float
    tasks: list[TaskRow]

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return asdict(self)


def evaluate_tasks(
    models: Sequence[str | Path],
    directories: Sequence[Path],
    request: TaskRequest,
    resamples: int,
    seed: int,
    progress: Progress,
) -> TaskEvaluation:
    """Run tasks on a model and, where two are given, on its reference.

    Values are the harness's own; intervals of 95 % are drawn from its results item by item.

    Raises:
        UserError: the harness is not installed, an unknown task, data that cannot be read, or a model that tasks are not for.
    """
    measured = _measure(models, directories, request, progress)
    others: list[float | None] = [None] * len(measured[0])
    if len(models) > 1:
        others = [units.total for units in measured[1]]
    rows = [_row(units, other, resamples, seed) for units, other in zip(measured[0], others, strict=True)]
    name = str(models[1]) if len(models) > 1 else None
    return TaskEvaluation(str(models[0]), name, request.limit, resamples, seed, LEVEL, rows)


def compare_on_tasks(
    models: Sequence[str | Path],
    directories: Sequence[Path],
    request: TaskRequest,
    resamples: int,
    seed: int,
    progress: Progress,
) -> PairedComparison:
    """Run tasks on several models, with intervals of the differences to the first over the same items.

    Raises:
        UserError: as `evaluate_tasks`, or fewer than two models or items.
    """
    check_several(models)
    measured = _measure(models, directories, request, progress)
    labels = [f"{units.task} {units.metric}" for units in measured[0]]
    return paired_comparison(models, measured, ", ".join(request.names), resamples, seed, labels=labels)


def _row(units: TaskUnits, reference: float | None, resamples: int, seed: int) -> TaskRow:
    low, high = interval(units, resamples=resamples, seed=seed)
    return TaskRow(
        units.task, units.metric, units.num_fewshot, len(units), units.total, low, high, reference, units.lower_is_better
    )  # fmt: skip


def _measure(
    models: Sequence[str | Path], directories: Sequence[Path], request: TaskRequest, progress: Progress
) -> list[list[TaskUnits]]:
    """Run the tasks on one model after another; tasks are read once."""
    for model, directory in zip(models, directories, strict=True):
        kind = kind_of(read_config(directory))
        if kind not in KINDS:
            raise UserError(
                f"--task: expected a model of text, got {model}, a model of {kind}; give --text SOURCE instead"
            )
    tasks = on_all(lambda: harness.load_tasks(request.names, request.include_path))
    found = []
    for number, directory in enumerate(directories, 1):
        report = partial(progress, "requests" if len(models) == 1 else f"requests {number}")
        dtype = request.dtype or compute_dtype(stored_dtype(directory), request.device)[0]
        found.append(
            harness.run(
                open_language_model(directory, dtype, request.device),
                open_tokenizer(directory),
                tasks,
                num_fewshot=request.num_fewshot,
                limit=request.limit,
                progress=report,
            )
        )
    return found
