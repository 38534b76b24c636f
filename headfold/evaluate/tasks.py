"""Tasks of lm-evaluation-harness, run by its own code on open models: metrics, and the scores of single items."""

import contextlib
import difflib
import io
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ..core.errors import UserError
from ..hf_models import quiet
from ..hf_models.streamed import input_device
from ..metrics.bootstrap import Units, ratio
from ..parallel import gathered_in_order, share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's defaults."""
MAX_BATCH = 64
LOGIT_BUDGET = 2**27
"""Number of logits held at once if no text has more than `USUAL` tokens."""
USUAL = 512

Requests = Callable[[int, int], None]
"""Called with the number of requests done and their total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskUnits:
    """One metric of one task: the harness's value as `total`, and its items (`bootstrap.Resampled`)."""

    task: str
    metric: str
    total: float
    num_fewshot: int | None
    lower_is_better: bool
    items: Sequence[Any]
    aggregate: Callable[[Sequence[Any]], float]
    sums: Units | None
    """The same metric as a function of sums over items, where it is one; saves a call of `aggregate` per resample."""
    unit: str = "items"

    def __len__(self) -> int:
        return len(self.items)

    def resampled(self, counts: Int[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        if self.sums is not None:
            return self.sums.resampled(counts)
        drawn = ([self.items[int(at)] for at in np.repeat(np.arange(len(row)), row)] for row in counts)
        return np.array([float(self.aggregate(items)) for items in drawn])


def require() -> Any:
    """Return the harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError("tasks need lm-evaluation-harness; pip install 'headfold[tasks]'") from error
    return lm_eval


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> dict[str, Any]:
    """Return the harness's tasks of these names (patterns such as `mmlu_*` too) with their data, in the form that its `evaluate` takes.

    `include_path` is a folder with the user's own task files, which take precedence over those of the harness.

    Raises:
        UserError: the harness is not installed, a name is unknown, or data cannot be read.
    """
    require()
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: expected a folder with task files (.yaml), found none there")
    with _silenced(), _seeded():
        manager = _manager(names, include_path)
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in _known(names, manager):
        for part, loaded in _load(name, manager).items():
            found[part].update(loaded)
    return found


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """Return a task manager of the user's folder only, where that has all names: listing the harness's 15,000 files takes eight
    seconds.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _known(names: Sequence[str], manager: Any) -> list[str]:
    matched = {name: manager.match_tasks([name]) for name in names}
    for name, found in matched.items():
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise UserError(f"--task {name}: no such task among {len(manager.all_tasks):,}; {hint}")
    return list(dict.fromkeys(name for found in matched.values() for name in found))


def _load(name: str, manager: Any) -> Mapping[str, Any]:
    try:
        with _silenced(), _seeded():
            return manager.load([name])
    except Exception as error:  # anything: what data sets are made of is code as well
        raise UserError(f"--task {name}: its data cannot be read: {_line(error)}; --debug shows where") from error


def run(
    model: "PreTrainedModel",
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    progress: Requests = lambda done, total: None,
) -> list[TaskUnits]:
    """Return the metrics of tasks from `load_tasks`, computed by the harness's `evaluate`.

    The figures are those of the harness's `simple_evaluate` (which also asks git, pip and the hub about this machine): the same
    seeds, and examples in the prompt where the task allows another number. Log-probabilities are computed in float32 or better:
    the harness's own choice for a bf16 model rounds those of a sentence to a half. `limit` takes the first items of each task
    only. Several processes share the requests; their batches then differ from those of one process, and so does rounding.

    Raises:
        UserError: whatever the harness fails on.
    """
    harness = require()
    writing = [name for name, task in tasks["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
    if writing and tokenizer.eos_token_id is None:
        raise UserError(
            f"--task {writing[0]}: the model is to write, but its tokenizer names no eos_token; add it there"
        )
    _set_examples(tasks["tasks"], num_fewshot)
    try:
        with _silenced(), _seeded(), quiet():
            lm = _wrapped(model, tokenizer, progress)
            found = harness.evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    except UserError:
        raise
    except Exception as error:  # a task file of the user's can be wrong in more ways than there are types for
        raise UserError(f"--task {','.join(tasks['tasks'])}: {_line(error)}; --debug shows where") from error
    units = [one for name in tasks["tasks"] for one in _units(tasks["tasks"][name], name, found)]
    return units + [one for name in found.get("groups") or {} for one in _group(name, found, units)]


def _set_examples(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _wrapped(model: "PreTrainedModel", tokenizer: Any, progress: Requests) -> Any:
    """Return the harness's wrapper of an open model, which counts the requests done."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        num_expected = num_done = 0

        def loglikelihood(self, requests: Any, **options: Any) -> Any:
            return self.shared(super().loglikelihood, requests, options)

        def loglikelihood_rolling(self, requests: Any, **options: Any) -> Any:
            return self.shared(super().loglikelihood_rolling, requests, options)

        def generate_until(self, requests: Any, **options: Any) -> Any:
            return self.shared(super().generate_until, requests, options)

        def shared(self, answer: Callable[..., Any], requests: list[Any], options: dict[str, Any]) -> list[Any]:
            """Answer the requests that fall to this rank, and return the answers of all ranks in the order of the requests."""
            own = share(len(requests))
            self.num_expected += len(own)
            answers = answer([requests[number] for number in own], **options) if own else []
            return gathered_in_order(list(zip(own, answers, strict=True)))

        def count(self, rows: int) -> None:
            self.num_done = min(self.num_done + rows, self.num_expected)
            progress(self.num_done, self.num_expected)

        def _model_call(self, inps: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
            self.count(len(inps))
            return super()._model_call(inps, *others, **options)

        def _model_generate(self, context: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
            self.count(len(context))
            return super()._model_generate(context, *others, **options)

    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    softmax = torch.promote_types(model.dtype, torch.float32)
    lm = Counting(pretrained=model, tokenizer=tokenizer, backend=backend, softmax_dtype=softmax, batch_size=1)
    lm._device = input_device(model)  # a streamed model's parameters are nowhere
    vocabulary = model.get_output_embeddings().weight.shape[0]
    lm.batch_size_per_gpu = max(1, min(MAX_BATCH, LOGIT_BUDGET // (min(lm.max_length, USUAL) * vocabulary)))
    return lm


def _units(task: Any, name: str, found: Mapping[str, Any]) -> Iterator[TaskUnits]:
    """Yield metrics by filter, as the harness reports them: `exact_match`, `exact_match,strict-match`."""
    samples, reported = found["samples"][name], found["results"][name]
    for key, total in reported.items():
        metric, _, kept = key.partition(",")
        items = [sample[metric] for sample in samples if sample["filter"] == kept and metric in sample]
        if not items or not isinstance(total, float | int):
            continue
        aggregate = task.aggregation().get(metric) or _mean()
        yield TaskUnits(
            task=name,
            metric=metric if kept == "none" else key,
            total=float(total),
            num_fewshot=found["n-shot"].get(name),
            lower_is_better=not task.higher_is_better().get(metric, True),
            items=items,
            aggregate=aggregate,
            sums=_sums(items, aggregate),
        )


def _group(name: str, found: Mapping[str, Any], units: Sequence[TaskUnits]) -> Iterator[TaskUnits]:
    """Yield those metrics of a group that are means over the items of all its tasks, equally weighted, as most are; skip the others."""
    tasks = _subtasks(name, found["group_subtasks"])
    for key, total in found["groups"][name].items():
        metric = key.removesuffix(",none")
        parts = [one for one in units if one.task in tasks and one.metric == metric]
        tables = [one.sums.sums for one in parts if one.sums is not None and one.sums.value is ratio]
        if not parts or len(tables) < len(parts):
            continue
        sums = Units(metric=metric, unit="items", sums=np.concatenate(tables))
        if isinstance(total, float) and math.isclose(sums.total, total, rel_tol=1e-9):
            yield TaskUnits(
                task=name,
                metric=metric,
                total=total,
                num_fewshot=found["n-shot"].get(name),
                lower_is_better=parts[0].lower_is_better,
                items=[item for one in parts for item in one.items],
                aggregate=parts[0].aggregate,
                sums=sums,
            )


def _subtasks(name: str, subtasks: Mapping[str, Sequence[str]]) -> set[str]:
    return set().union(*(_subtasks(child, subtasks) for child in subtasks[name])) if subtasks.get(name) else {name}


def _mean() -> Any:
    from lm_eval.api.registry import get_aggregation

    return get_aggregation("mean")


def _sums(items: Sequence[Any], aggregate: Any) -> Units | None:
    """Return the metric as a function of sums, where it is one; items are numbers, or pairs of a log-likelihood and a length."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    forms = {
        "mean": ratio,
        "perplexity": lambda sums: np.exp(-ratio(sums)),
        "weighted_perplexity": lambda sums: np.exp(-ratio(sums)),
        "bits_per_byte": lambda sums: -ratio(sums) / math.log(2),
    }
    form = next((form for name, form in forms.items() if AGGREGATION_REGISTRY.get(name) is aggregate), None)
    try:
        table = np.array(items, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if form is None or table.ndim > 2 or (table.ndim == 2 and table.shape[1] != 2):
        return None
    table = table if table.ndim == 2 else np.stack([table, np.ones(len(table))], 1)
    return Units(metric="", unit="items", sums=table, value=form)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Return a context in which the harness prints nothing: headfold shows results itself, and errors are raised."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Return a context in which all generators are seeded as the harness does it; their states are restored afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
