"""The reports of `headfold eval`: a model beside its reference, a paired comparison of several models, and tasks."""

from typing import Any

from .tables import percent, show_table, size

HEADER = ["metric", "model", "value", "difference", "interval", "p", ""]
MEASURES = (
    ("NLL (nats per target token)", "{:.4f}", "nll"),
    ("BLEU", "{:.2f}", "bleu"),
    ("ROUGE-1", "{:.2f}", "rouge1"),
    ("ROUGE-2", "{:.2f}", "rouge2"),
    ("ROUGE-L", "{:.2f}", "rougeL"),
    ("ROUGE-Lsum", "{:.2f}", "rougeLsum"),
    ("word error rate", "{:.2%}", "wer"),
    ("wrong words beside the reference's transcripts", "{:.2%}", "wer_to_reference"),
    ("accuracy", "{:.2%}", "accuracy"),
    ("cross-entropy (nats)", "{:.4f}", "cross_entropy"),
    ("KL(reference || model)", "{:.4f}", "kl"),
    ("same class", "{:.2%}", "agreement"),
    ("cosine to the reference, mean", "{:.4f}", "cosine"),
    ("cosine to the reference, lowest", "{:.4f}", "worst_cosine"),
    ("rank correlation of similarities", "{:.4f}", "rank_correlation"),
)
"""Label, format and field of each measure. The reference's value is in the field `reference_FIELD`."""


def show_scores(found: Any) -> None:
    """Print the scores of a model on data that is not plain text, beside those of its reference."""
    rows = []
    for label, form, field in MEASURES:
        if getattr(found.measured, field, None) is not None:
            beside = getattr(found.measured, f"reference_{field}", None)
            rows.append([label, *_numbers(form, getattr(found.measured, field), beside)])
    title = f"{found.measured.num_items:,} {found.kind} of {found.source}, computed in {found.dtype}"
    headers = ["", found.model] + ([] if found.reference is None else [found.reference])
    show_table(headers, [row[: len(headers)] for row in rows], title=title)
    if normaliser := getattr(found.measured, "normaliser", None):
        print(f"words are compared after Whisper's {normaliser} normalisation")
    for note in found.notes:
        print(f"note: {note}")


def show_evaluation(found: Any) -> None:
    """Print the loss and perplexity of a language model beside those of its reference."""
    title = f"{found.num_tokens:,} tokens of {found.text}, context {found.context}, computed in {found.dtype}"
    rows = [
        ["K/V cache per token", size(found.kv_bytes_per_token), _size(found.reference_kv_bytes_per_token)],
        ["NLL (nats per token)", *_numbers("{:.4f}", found.nll, found.reference_nll)],
        ["perplexity", *_numbers("{:.3f}", found.perplexity, found.reference_perplexity)],
        ["KL(reference || model)", *_numbers("{:.4f}", found.kl, None)],
        ["same most likely token", "" if found.top1_agreement is None else percent(found.top1_agreement), ""],
    ]
    if found.reference is None:
        show_table(["", found.model], [row[:2] for row in rows[:3]], title=title)
    else:
        show_table(["", found.model, found.reference], rows, title=title)


def _numbers(form: str, *values: float | None) -> list[str]:
    return ["" if value is None else form.format(value) for value in values]


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else size(num_bytes)


def show_paired_comparison(found: Any) -> None:
    """Print a paired comparison, metric by metric: the first model, then the others with their difference to it."""
    numbers = dict.fromkeys(f"{row.num_units:,}" for row in found.rows)
    title = f"{' and '.join(numbers)} {found.rows[0].units} of {found.source}"
    show_table(HEADER, [_cells(row, at, found.rows) for at, row in enumerate(found.rows)], title=title)
    level = f"{100 * found.level:.0f} %"
    print(
        f"difference to {found.rows[0].model}, with its {level} interval by paired bootstrap over {found.resamples:,} resamples"
    )
    for note in found.notes:
        print(f"note: {note}")


def show_tasks(found: Any) -> None:
    """Print the scores of a model on tasks of the evaluation harness, with their intervals."""
    header = ["task", "metric", "shots", "items", found.model, "interval"]
    header += [] if found.reference is None else [found.reference]
    rows = []
    for row in found.tasks:
        start = [row.task, f"{row.metric} {_arrow(row)}", "" if row.num_fewshot is None else str(row.num_fewshot)]
        values = [_number(row.value), f"[{_number(row.low)}, {_number(row.high)}]"]
        beside = [] if row.reference is None else [_number(row.reference)]
        rows.append([*start, f"{row.num_items:,}", *values, *beside])
    show_table(header, rows)
    print(f"interval: {100 * found.level:.0f} %, by bootstrap over items with {found.resamples:,} resamples")


def _arrow(row: Any) -> str:
    return "↓" if row.lower_is_better else "↑"


def _cells(row: Any, at: int, rows: Any) -> list[str]:
    same_metric = at and rows[at - 1].metric == row.metric
    start = ["" if same_metric else f"{row.metric} {_arrow(row)}", row.model, _number(row.value)]
    if row.difference is None:
        return [*start, "", "", "", ""]
    difference, low, high = (f"{number:+.{_digits(row.value)}f}" for number in (row.difference, row.low, row.high))
    return [*start, difference, f"[{low}, {high}]", f"{row.p:.2g}", row.verdict]


def _number(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    """Return the number of decimals: four for losses and shares, two for percents and perplexities."""
    return 4 if abs(value) < 10 else 2
