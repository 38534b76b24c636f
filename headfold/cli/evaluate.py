"""headfold eval."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UserError
from .options import DATA, HOW, MEASURE, Columns, Debug, Device, Dtype, Json, TrustRemoteCode, option
from .output import answered, given, names

EXAMPLES = (
    "headfold eval my-model-gqa --reference my-model --text notes.txt",
    "headfold eval --compare my-model my-model-gqa other-fold",
)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="A checkpoint directory, a GGUF file or a hub id; several with --compare."),
    ],
    compare: Annotated[
        bool,
        option("--compare", panel=MEASURE, help="Measure several models on the same data, with their differences to the first."),
    ] = False,
    reference: Annotated[
        str | None, option("--reference", panel=MEASURE, metavar="ORIGINAL", help="The model that MODEL was folded from.")
    ] = None,
    adapter: Annotated[
        str | None,
        option(
            "--adapter", panel=MEASURE, metavar="DIR",
            help="A LoRA adapter of peft, merged into the original first: ORIGINAL, or without --reference the first MODEL.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    text: Annotated[
        str | None,
        option(
            "--text", panel=DATA, metavar="SOURCE",
            help="Data to measure on: text, or any source as in --calibration; pairs of text (SRC.en,SRC.de or a table); sentences; a "
            "folder or table of images. Default, for language models alone: the bundled text.",
        ),
    ] = None,
    columns: Columns = None,
    task: Annotated[
        str | None,
        option(
            "--task", panel=DATA, metavar="NAME,NAME",
            help="Run tasks of lm-evaluation-harness instead, by its own code: hellaswag, mmlu_*. "
                "Needs the extra named tasks: pip install 'headfold\\[tasks]'.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, option("--include-path", panel=DATA, metavar="DIR", help="A folder with task files (.yaml) of your own.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        option("--num-fewshot", panel=DATA, metavar="N", min=0, help="Examples before each item. Default: the task's own number."),
    ] = None,
    limit: Annotated[
        int | None,
        option("--limit", panel=DATA, metavar="N", min=1, help="Number of items (of each task), or of tokens for text."),
    ] = None,
    context: Annotated[
        int | None,
        option("--context", panel=DATA, metavar="N", min=2, help="Tokens per window, or where texts are cut. "
            "Default: the model's own, at most 2048."),
    ] = None,
    metric: Annotated[
        str | None,
        option("--metric", panel=HOW, metavar="METRIC", help="Metric of the text that an encoder-decoder "
            "generates: bleu or rouge. Default: bleu."),
    ] = None,
    beams: Annotated[
        int | None, option("--beams", panel=HOW, metavar="N", min=1, help="Beams that an encoder-decoder generates with. Default: 1.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        option(
            "--max-new-tokens", panel=HOW, metavar="N", min=0,
            help="Maximum length of an output; 0 skips generation, and BLEU, ROUGE and the word error rate. Default: 128, of speech 224.",
        ),
    ] = None,
    resamples: Annotated[
        int | None,
        option("--resamples", panel=HOW, metavar="N", min=1000, help="Draws of the bootstrap behind intervals. Default: 2000."),
    ] = None,
    seed: Annotated[int | None, option("--seed", panel=HOW, help="Seed of the bootstrap. Default: 0.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Measure perplexity, BLEU or ROUGE, wrong words, accuracy, embeddings, or tasks.

    What is measured depends on the model: perplexity of a language model, loss and BLEU or ROUGE of an encoder-decoder (of speech, the
    word error rate), accuracy of a classifier, similarity of an encoder's embeddings to the original's. With --reference the original is
    measured as well, and the KL to it. With --compare several models are measured, and 95 % intervals of the differences are given."""
    _check_count(models, compare)
    from ..evaluate.data import DataEvaluation
    from ..evaluate.harness import TaskEvaluation
    from ..evaluate.paired import PairedComparison
    from ..reports import evaluations
    from ..reports.progress import ProgressReport
    from ..verbs import evaluate as verb

    chosen = given(
        reference=reference, adapter=adapter, text=text, columns=names(columns), metric=metric, beams=beams, max_new_tokens=max_new_tokens,
        task=names(task), num_fewshot=num_fewshot, include_path=include_path, limit=limit, context=context,
        resamples=resamples, seed=seed,
    )  # fmt: skip
    with ProgressReport(brief=as_json) as progress:
        found = verb.evaluate(
            models[0], compare=models[1:], trust_remote_code=trust_remote_code, device=device, dtype=dtype, progress=progress, **chosen,
        )  # fmt: skip
    if not answered(verb.facts(found), as_json):
        match found:
            case PairedComparison():
                evaluations.show_paired_comparison(found)
            case TaskEvaluation():
                evaluations.show_tasks(found)
            case DataEvaluation():
                evaluations.show_scores(found)
            case _:
                evaluations.show_evaluation(found)


def _check_count(models: list[str], compare: bool) -> None:
    if compare and len(models) < 2:
        raise UserError(
            f"eval: --compare: expected at least two models, got {models[0]} alone; name the others after it"
        )
    if len(models) > 1 and not compare:
        raise UserError(
            f"eval: expected one model, got {len(models)}; to measure them on the same data, give --compare"
        )
