"""Models on tasks of lm-evaluation-harness: one, beside its original, or several with intervals of their differences."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.hub import resolve
from ..core.errors import UserError
from ..corpus.samples import kind_of
from ..evaluate import tasks as harness
from ..evaluate.bootstrap import LEVEL, RESAMPLES, interval
from ..evaluate.perplexity import open_language_model
from ..evaluate.tasks import TaskUnits
from ..hf_models import compute_dtype, open_tokenizer, stored_dtype
from .contrasting import Contrast, check_several, contrasted
from .measuring import default_device
from .source import Progress, silent

KINDS = ("text", "pairs")
"""Of models that tasks are for."""


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
class TaskScores:
    """What a model reaches on tasks, and the same of its reference."""

    model: str
    reference: str | None
    limit: int | None
    resamples: int
    seed: int
    level: float
    tasks: list[TaskRow]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_tasks(
    model: str | Path,
    names: Sequence[str],
    *,
    reference: str | Path | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> TaskScores:
    """Run tasks of lm-evaluation-harness, by name or pattern, or of the folder `include_path`, on `model` and on `reference`.

    Values are the harness's own; intervals of 95 % are drawn from its results item by item. `num_fewshot` examples go before each item
    (default: the task's own number), `limit` is how many items of each task are run.

    Raises:
        UserError: the harness is not installed, an unknown task, data that cannot be read, or a model that tasks are not for.
    """
    models = [model] if reference is None else [model, reference]
    options = {"num_fewshot": num_fewshot, "include_path": include_path, "limit": limit}
    measured = _measured(models, names, device=device, progress=progress, **options)
    others = [None] * len(measured[0]) if reference is None else [units.total for units in measured[1]]
    rows = [_row(units, other, resamples, seed) for units, other in zip(measured[0], others, strict=True)]
    name = None if reference is None else str(reference)
    return TaskScores(str(model), name, limit, resamples, seed, LEVEL, rows)


def contrast_tasks(
    models: Sequence[str | Path],
    names: Sequence[str],
    *,
    reference: str | Path | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Contrast:
    """Tasks as of `evaluate_tasks` on several models, with intervals of the differences to the first over the same items.

    Raises:
        UserError: as `evaluate_tasks`, or fewer than two models or items.
    """
    check_several(models)
    if reference is not None:
        raise UserError("--reference beside --compare with --task means nothing; name the original as the first model")
    options = {"num_fewshot": num_fewshot, "include_path": include_path, "limit": limit}
    measured = _measured(models, names, device=device, progress=progress, **options)
    labels = [f"{units.task} {units.metric}" for units in measured[0]]
    return contrasted(models, measured, ", ".join(names), resamples, seed, labels=labels)


def _row(units: TaskUnits, reference: float | None, resamples: int, seed: int) -> TaskRow:
    low, high = interval(units, resamples=resamples, seed=seed)
    return TaskRow(
        units.task,
        units.metric,
        units.num_fewshot,
        len(units),
        units.total,
        low,
        high,
        reference,
        units.lower_is_better,
    )


def _measured(
    models: Sequence[str | Path],
    names: Sequence[str],
    *,
    num_fewshot: int | None,
    include_path: str | Path | None,
    limit: int | None,
    device: str | None,
    progress: Progress | None,
) -> list[list[TaskUnits]]:
    """One model open at a time; tasks are read once."""
    directories = [resolve(str(model)) for model in models]
    for model, directory in zip(models, directories, strict=True):
        kind = kind_of(json.loads((directory / "config.json").read_text()))
        if kind not in KINDS:
            raise UserError(
                f"--task: expected a model of text, got {model}, a model of {kind}; give --text SOURCE instead"
            )
    tasks, device, told = harness.load_tasks(names, include_path), device or default_device(), progress or silent
    found = []
    for number, directory in enumerate(directories, 1):
        stage = "requests" if len(models) == 1 else f"requests {number}"
        dtype, _ = compute_dtype(stored_dtype(directory), device)
        found.append(
            harness.run(
                open_language_model(directory, dtype, device),
                open_tokenizer(directory),
                tasks,
                num_fewshot=num_fewshot,
                limit=limit,
                progress=lambda done, total, stage=stage: told(stage, done, total),
            )
        )
    return found
