"""What came of it, in a few sentences at the top of the page: what was folded, the cache before and after, and the loss."""

from collections.abc import Mapping
from pathlib import PurePath

from markupsafe import Markup

from ..comparison import MethodRow
from ..evaluate.perplexity import Evaluation
from ..reports.tables import percent, size
from .contents import Contents, Fold, Front, MethodTable
from .elements import Section, paragraph
from .results import DataResult, Result
from .summary import LABELS, NOT_CACHED, kv_heads, merges, row_of

_UNCACHED = "It caches nothing; while it runs, keys and values of a token take {1} instead of {0}."
MEASURED = (
    ("nll", "loss", "{:.3f} nats per token".format),
    ("wer", "word error rate", percent),
    ("bleu", "BLEU", "{:.2f}".format),
    ("rougeL", "ROUGE-L", "{:.2f}".format),
    ("accuracy", "accuracy", percent),
)
"""Fields of results with a value of the original beside them, what they are called in a sentence, and how a value is written."""
_ITEMS = {"audio": "recordings", "pairs": "pairs of text", "images": "images", "sentences": "sentences"}
"""What items of a kind of data are called."""


def section(contents: Contents) -> Section | None:
    """Return the section; None where there is neither a fold nor a comparison nor a frontier."""
    said = [_fold(fold, contents) for fold in contents.folds]
    said += [_methods(methods) for methods in contents.tables if methods.rows]
    said += [_front(front) for front in contents.fronts if front.points]
    parts: list[Markup] = [paragraph(text, "outcome") for text in said]
    return Section("Outcome", parts, {}) if parts else None


def _fold(fold: Fold, contents: Contents) -> str:
    before, after = kv_heads(fold)
    sites = len(fold.plan.sites)
    where = f"at its {sites} attention blocks" if sites > 1 else "at its attention block"
    made = f"{fold.name} is {fold.base_model or 'a model'} with {after} instead of {before} key/value heads {where}"
    losses = [text for found in contents.results if (text := _lost(found, fold))]
    return " ".join([
        f"{made}, merged by {merges(fold).partition(':')[0]}.", _cache(fold, contents), *(losses or ["Its loss was not measured."])
    ])  # fmt: skip


def _cache(fold: Fold, contents: Contents) -> str:
    """Return a sentence on the bytes of K and V of a token."""
    if contents.original is not None:
        costs = contents.original.costs[fold.name]
        before, after = costs[0].kv_bytes_per_token, costs[1].kv_bytes_per_token
        if not costs[0].caches:
            return _UNCACHED.format(size(before), size(after))
        return f"Its cache takes {size(after)} per token instead of {size(before)} ({percent(after / before)})."
    for label, text in (
        (LABELS[0], "Its cache takes {1} per token instead of {0}."),
        (NOT_CACHED[LABELS[0]], _UNCACHED),
    ):
        if sizes := row_of(fold, label):
            return text.format(*sizes)
    known = fold.kv_bytes_per_token
    return "" if known is None else f"Its cache takes {size(known)} per token; that of the original is not known here."


def _lost(found: Result, fold: Fold) -> str:
    """Return a sentence on what a result says of a fold; empty where it is about other models or has none of these values."""
    if not isinstance(found, Evaluation | DataResult):
        return ""
    called = PurePath(found.model).name
    name, _, adapter = (called, "", "") if called == fold.name else called.partition(" + ")
    if name != fold.name:
        return ""
    begins = f"With the adapter {adapter}, on" if adapter else "On"
    if isinstance(found, Evaluation):
        where, values = f"{found.num_tokens:,} tokens of {found.text}", {"nll": (found.nll, found.reference_nll)}
        kl = "" if found.kl is None else f" The KL to the original is {found.kl:.3f} nats per token."
        return f"{begins} {where}, {_in_words(values)}.{kl}"
    where = f"{found.num_items:,} {_ITEMS.get(found.kind, 'items')} of {found.source}"
    if text := _in_words(found.measures):
        return f"{begins} {where}, {text}."
    if "cosine" in found.measures:
        cosine, _ = found.measures["cosine"]
        return f"{begins} {where}, its embeddings have a cosine of {cosine:.4f} to those of the original on average; 1 is the same."
    return ""


def _in_words(values: Mapping[str, tuple[float, float | None]]) -> str:
    """Return what was measured of a fold and of the original, as parts of a sentence."""
    found = [(name, written, *values[field]) for field, name, written in MEASURED if field in values]
    return "; ".join(
        f"its {name} is {written(own)}" + ("" if beside is None else f", the original's {written(beside)}")
        for name, written, own, beside in found
    )


def _methods(methods: MethodTable) -> str:
    """Return which method loses least at each count, in the order of the counts."""
    best: dict[int, MethodRow] = {}
    for row in sorted(methods.rows, key=lambda row: row.loss_increase):
        best.setdefault(row.num_kv_heads, row)
    unit = "nats per token" if methods.rows[0].metric == "nll" else methods.rows[0].metric
    best_of_counts = [
        f"at {count} K/V head{'s' if count > 1 else ''} {row.method} loses least ({row.loss_increase:+.3f} {unit})"
        for count, row in sorted(best.items(), reverse=True)
    ]
    num_methods = len({row.method for row in methods.rows})
    return f"Of the {num_methods} methods in {methods.name}, {', '.join(best_of_counts)}."


def _front(front: Front) -> str:
    least, most = (one(front.points, key=lambda point: point.kv_bytes_per_token) for one in (min, max))
    return (
        f"The budgets in {front.name} go from {size(least.kv_bytes_per_token)} per token, with a predicted loss increase of "
        f"{least.predicted:.3g}, to {size(most.kv_bytes_per_token)}, with {most.predicted:.3g}."
    )
