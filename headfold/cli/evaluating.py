"""The verb that measures: eval."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UserError
from ..report import contrasts, views
from ..report.progress import ProgressReport
from .answers import answer, given, names
from .options import Context, Debug, Json


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="A checkpoint directory or a hub id; several with --compare."),
    ],
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Measure several models on the same data, and how far each is from the first."),
    ] = False,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="ORIGINAL", help="The model it was folded from.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="SOURCE",
            help="What to measure on: text, or any source as in --calibration; pairs of text (SRC.en,SRC.de or a table); "
            "sentences; a folder or table of images. Default, for language models alone: the bundled text.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="A,B", help="Columns of a table. Default: source,target; image,label."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="METRIC",
            help="What the outputs of an encoder-decoder are measured by: bleu or rouge. Default: bleu.",
        ),
    ] = None,
    beams: Annotated[
        int | None, typer.Option("--beams", metavar="N", min=1, help="Beams that outputs are written with. Default: 1.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=0,
            help="Where an output is cut at the latest; 0: none is written, so no BLEU or ROUGE. Default: 128.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="NAME,NAME",
            help="Run tasks of lm-evaluation-harness instead, by its own code: hellaswag, mmlu_*; needs headfold[tasks].",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", metavar="N", min=0, help="Examples before each item. Default: the task's own."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="A folder with task files (.yaml) of your own.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Items to measure on, of each task; tokens of plain text."),
    ] = None,
    context: Context = None,
    resamples: Annotated[
        int | None,
        typer.Option(
            "--resamples", metavar="N", min=1000, help="Draws of the bootstrap behind intervals. Default: 2000."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of these draws. Default: 0.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, BLEU or ROUGE, accuracy, embeddings, or tasks.

    By what the model is: a language model's perplexity and KL to the original, loss and BLEU or ROUGE of an encoder-decoder, accuracy of
    a classifier, likeness of an encoder's embeddings to the original's. With --reference always beside the original; with --compare
    several models, with 95 % intervals of the differences."""
    _check_count(models, compare)
    from ..recipe import evaluating

    chosen = given(
        reference=reference, text=text, columns=names(columns), metric=metric, beams=beams, max_new_tokens=max_new_tokens,
        task=names(task), num_fewshot=num_fewshot, include_path=include_path, limit=limit, context=context,
        resamples=resamples, seed=seed,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        found = evaluating.evaluate(models[0], compare=models[1:], progress=progress, **chosen)
    if not answer(evaluating.facts(found), as_json):
        show = {"Contrast": contrasts.show_contrast, "TaskScores": contrasts.show_tasks}
        show.get(type(found).__name__, views.show_evaluation)(found)


def _check_count(models: list[str], compare: bool) -> None:
    if compare and len(models) < 2:
        raise UserError(
            f"eval: --compare: expected at least two models, got {models[0]} alone; name the others behind it"
        )
    if len(models) > 1 and not compare:
        raise UserError(
            f"eval: expected one model, got {len(models)}; to measure them on the same data, give --compare"
        )
