"""Run a recipe: fold a model once or several ways, measure the folds beside it, and write a page on them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.hub import NamedDirectory
from ..checkpoint.staging import refuse_overlap, write_json
from ..comparison import scored
from ..conversion.source import Source, open_source
from ..core.errors import AlreadyFinished, UserError
from ..core.progress import Progress
from ..evaluate.data import DataEvaluation
from ..evaluate.perplexity import Evaluation
from ..outputs import owned_directory
from ..pages.folders import EVALUATION
from ..pages.page import require_charts
from ..pages.samples import data_of_samples
from ..pages.writing import NAME
from ..parallel import on_all, on_main
from ..planning import statistics_needed
from ..recipes.recipe import FoldStep, Recipe, read_recipe
from ..recipes.steps import FoldFacts, Row, Steps
from ..trusted_code import trusted_code, trusts_code
from .evaluate import evaluate, facts
from .fold import fold
from .report import report


def _models(options: Mapping[str, Any]) -> list[Any]:
    """Return the model that a run folds."""
    return [options.get("model") or on_main(lambda: read_recipe(Path(options["recipe"]), fold, evaluate)).model]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a recipe made."""

    out: Path
    rows: list[Row]
    report: Path | None = None
    """The page on all folds."""

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {**asdict(self), "out": str(self.out), "report": self.report and str(self.report)}


@trusts_code(models=_models)
def run(
    recipe: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Do what a recipe says: the `headfold.yaml` of a fold, which makes that fold again, or one that was written by hand.

    A recipe with `fold` writes one checkpoint directory. One with `folds` writes a directory for each below `out`, an evaluation of each
    (`eval`), and a page on all (`report`); after a kill the same call goes on with what is missing.

    Args:
        recipe, out: A file of YAML, and the directory to write.
        model: The model to fold, instead of the one that the recipe names.
        trust_remote_code: Run the code that the model brings for its class, whatever the recipe says.
        force, device: Replace what is at `out`; where models run: "cpu" or "cuda".
        progress, say: Called with (stage, done, total), and with lines to print.

    Raises:
        UserError: a recipe that cannot be read, with the line; a model of which it was not made; else as `headfold.fold`.
    """
    read, out = on_main(lambda: read_recipe(Path(recipe), fold, evaluate)), Path(out)
    name = read.model if model is None else str(model)
    with read.at(read.model_line if model is None else 0):
        source = on_all(lambda: open_source(name, adapter=read.adapter, progress=progress, say=say))
        code = trusted_code(source.config["model_type"])
        read.check_source(name, source.checkpoint.fingerprint(), "" if code is None else code.digest)
        refuse_overlap(source.plain.given, out)
    if read.version not in ("", version("headfold")):
        say(
            f"note: {read.path} was written by headfold {read.version}; this is {version('headfold')}, whose folds may differ"
        )
    _check(read)
    how: dict[str, Any] = {"device": device, "progress": progress}
    original = NamedDirectory(source.plain.path, name)
    if read.is_single:
        return RunResult(out, [Row("", _fold(read, read.folds[0], name, out, {**how, "say": say}, force))])
    with owned_directory(out):
        steps = on_main(lambda: Steps.opened(out, _facts(read, source), force))
        for number, step in enumerate(read.folds):
            if step.name not in steps.done:
                say(f"{step.name}: fold {number + 1} of {len(read.folds)}")
                ours = force or step.name in steps.begun
                steps = on_main(partial(steps.begin, step.name))
                made = _fold(read, step, name, out / step.name, {**how, "say": say}, ours)
                steps = on_main(partial(steps.finish, step.name, made))
        rows = [Row(step.name, steps.done[step.name]) for step in read.folds]
        rows = rows if read.evaluation is None else [_measured(read, row, out, original, how) for row in rows]
        page = out / NAME if read.report else None
        if page is not None:
            shown = [out / row.name for row in rows] + [out / f"{row.name}{EVALUATION}" for row in rows if row.metric]
            with read.at(read.report_line):
                written = data_of_samples(source.config, read.evaluation)
                report(shown, out=page, original=original.path if read.adapter else name, force=True, **written, **how)
    return RunResult(out, rows, page)


def _facts(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return what decides the output."""
    ran = {"code": code.digest} if (code := trusted_code(source.config["model_type"])) is not None else {}
    return {**recipe.facts(), "model": source.checkpoint.fingerprint(), "version": version("headfold"), **ran}


def _check(recipe: Recipe) -> None:
    """Refuse before the first fold what a later one, or the page, would end with."""
    for step in recipe.folds:
        with recipe.at(step.line, step.name):
            named = [name for name in ("kv_heads", "plan", "to") if name in step.options]
            if len(named) != 1:
                raise UserError(f"expected one of kv_heads, plan and to, got {' and '.join(named) or 'none'}; give one")
            statistics_needed(step.options.get("group", "swap"), step.options.get("merge", "absorb"))
    if recipe.report:
        with recipe.at(recipe.report_line):
            require_charts()
            if latent := [step.name for step in recipe.folds if "to" in step.options]:
                raise UserError(f"expected folds to fewer K/V heads on a page, got {latent[0]}; leave out report")


def _fold(recipe: Recipe, step: FoldStep, model: str, out: Path, how: Mapping[str, Any], force: bool) -> FoldFacts:
    """Fold as a step says."""
    plan = recipe.plan_of(step)
    options = {**how, **step.options, "adapter": recipe.adapter} | ({} if plan is None else {"plan": plan})
    with recipe.at(step.line, step.name):
        try:
            found = fold(model, out, force=force, **options)
        except AlreadyFinished:  # it was killed after it was whole, so what it printed is not known
            if recipe.is_single:
                raise
            found = fold(model, out, force=True, **options)
    return FoldFacts(
        found.num_kv_heads_least, found.num_kv_heads_after, found.kv_bytes_before, found.kv_bytes_after,
        round(sum(found.seconds.values()), 1), found.notes,
    )  # fmt: skip


def _measured(recipe: Recipe, row: Row, out: Path, original: NamedDirectory, how: Mapping[str, Any]) -> Row:
    """Measure a fold beside the model, and write what `headfold eval --json` prints."""
    with recipe.at(recipe.evaluation_line, row.name):
        found = evaluate(out / row.name, reference=original, **{**how, **(recipe.evaluation or {})})
        assert isinstance(found, Evaluation | DataEvaluation)  # a recipe names no tasks
    on_main(lambda: write_json(out / f"{row.name}{EVALUATION}", facts(found)))
    metric, value, unfolded, _, kl = scored(found)
    return replace(row, metric=metric, value=value, original=unfolded, kl=kl)
