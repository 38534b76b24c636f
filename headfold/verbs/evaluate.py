"""Measure a model on data of its kind or on tasks: alone, beside its reference, or several on the same data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.config import read_config
from ..checkpoint.hub import NamedDirectory
from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..corpus.samples import kind_of
from ..evaluate import perplexity
from ..evaluate.data import DataEvaluation, DataRequest, check_metric, evaluate_on_data
from ..evaluate.harness import TaskEvaluation, TaskRequest, compare_on_tasks, evaluate_tasks
from ..evaluate.paired import PairedComparison, compare_on_data
from ..evaluate.perplexity import Evaluation
from ..hf_models import check_device, dtype_named
from ..in_memory.data import evaluation_data
from ..in_memory.models import takes_models
from ..metrics.bootstrap import RESAMPLES
from ..parallel import on_all, on_main
from ..sources.plain import open_plain
from ..trusted_code import trusts_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_OPTIONS = ("num_fewshot", "include_path")
"""Options that only tasks have."""
DATA_OPTIONS = ("text", "metric", "columns", "context", "beams", "max_new_tokens")
"""Options that only data has."""
INTERVAL_OPTIONS = ("resamples", "seed")
"""Options that only comparisons and tasks have."""


@takes_models("model", "compare", "reference")
@trusts_code("model", "compare", "reference")
def evaluate(
    model: "str | Path | PreTrainedModel",
    *,
    compare: "Sequence[str | Path | PreTrainedModel]" = (),
    reference: "str | Path | NamedDirectory | PreTrainedModel | None" = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    text: str | Iterable[Any] | None = None,
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
    dtype: str | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Evaluation | DataEvaluation | TaskEvaluation | PairedComparison:
    """Measure `model` on data of its kind or on a task of lm-evaluation-harness.

    A causal language model is measured by perplexity, KL and top-1 agreement; an encoder-decoder by its loss and BLEU or ROUGE, of
    speech by its loss and word error rate; a classifier by accuracy; any other encoder by the likeness of its embeddings to the
    reference's, which it needs.

    Args:
        model: A checkpoint directory, a GGUF file, a hub id, or a model of transformers in memory, as `compare` and `reference` may be.
        compare: Other models to measure on the same data, with 95 % intervals of their differences to `model`.
        reference: The original that KL, agreement and likeness are relative to.
        adapter: A LoRA adapter of peft that is merged into the original first: into `reference` or, without one, into `model`.
        trust_remote_code: Run the code that models bring for their class.
        text: A source of `headfold.corpus` that suits the model, or data as `headfold.calibrate` takes them; by default, for language
            models alone, the bundled held-out text.
        metric: "bleu" or "rouge", for what an encoder-decoder writes.
        columns: Columns of a table.
        context: Tokens per window, or where texts are cut.
        beams: Beams that an encoder-decoder writes with; by default 1.
        max_new_tokens: Where its outputs are cut; 0 writes none. By default 128, of speech 224.
        task: A task of lm-evaluation-harness, or several, by name or pattern.
        num_fewshot: Examples before each item of a task; by default the task's own number.
        include_path: A folder with task files.
        limit: Items to measure on; tokens of plain text.
        resamples: Draws of the bootstrap behind intervals.
        seed: Seed of these draws.
        device: "cpu" or "cuda".
        dtype: What the models compute in, such as "float32".
        tokenizer: That of models in memory, or their processor; by default what lies beside the files that they were opened from.
        progress: Called with (stage, done, total).

    Raises:
        UserError: a checkpoint or source that cannot be read, or options that exclude each other.
    """
    given = {name: value for name, value in locals().items() if name in _EXCLUSIVE and value is not None}
    progress, where, compute_dtype = progress or no_progress, check_device(device), dtype_named(dtype)
    if isinstance(text, str) and text == "self":
        raise UserError(
            "--text self: expected a text that was there before; only calibration can use what a model writes"
        )
    interval = (RESAMPLES if resamples is None else resamples, seed or 0)
    models: list[Any] = [model, *compare, *([] if reference is None else [reference])]
    names, at = [*map(str, models)], 0 if reference is None else len(models) - 1  # where the original is
    adapters = [None if adapter is None or index != at else str(adapter) for index in range(len(models))]
    names[at] += "" if adapter is None else f" + {Path(adapter).resolve().name}"  # labels take the last part
    if task is None:
        _refuse(given, TASK_OPTIONS, "without --task NAME")
    else:
        _refuse(given, DATA_OPTIONS, "beside --task")
    pairs = [*zip(models, adapters, strict=True)]
    directories = on_all(lambda: [open_plain(each, lora, progress).path for each, lora in pairs])
    directory, original = directories[0], None if reference is None else directories[-1]
    if task is not None:
        if compare and reference is not None:
            raise UserError(
                "eval: --reference has no meaning beside --compare with --task; name the original as the first model"
            )
        wanted = [task] if isinstance(task, str) else list(task)
        tasks = TaskRequest(wanted, num_fewshot, include_path, limit, where, compute_dtype)
        run = compare_on_tasks if compare else evaluate_tasks
        return run(names, directories, tasks, *interval, progress)
    measured_on = on_main(lambda: evaluation_data(directory, text, limit, context, columns or ()))
    data = DataRequest(
        measured_on,
        columns or (), context, limit, metric, beams or 1, max_new_tokens,
        where, compute_dtype,
    )  # fmt: skip
    if compare:
        several = slice(1 + len(compare))
        return compare_on_data(names[several], directories[several], original, data, *interval, progress)
    _refuse(given, INTERVAL_OPTIONS, "without --compare or --task")
    kind, named = kind_of(read_config(directory)), None if reference is None else names[-1]
    check_metric(metric, kind, names[0])
    if kind != "text":
        return evaluate_on_data(names[0], directory, named, original, data, progress)
    found = perplexity.evaluate_perplexity(
        directory, original, measured_on, context=context, max_tokens=limit, device=where, dtype=compute_dtype, progress=progress
    )  # fmt: skip
    return replace(found, model=names[0], reference=named)


_EXCLUSIVE = frozenset((*TASK_OPTIONS, *DATA_OPTIONS, *INTERVAL_OPTIONS))


def _refuse(given: Mapping[str, Any], options: Sequence[str], where: str) -> None:
    for name in options:
        if name in given:
            raise UserError(f"eval: --{name.replace('_', '-')} has no meaning {where}; leave it out")


def facts(found: Evaluation | DataEvaluation | TaskEvaluation | PairedComparison) -> Any:
    """Return the machine-readable form: a list of rows for a comparison, else one object."""
    if isinstance(found, Evaluation):
        return {**asdict(found), "perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity}
    return found.to_json()
