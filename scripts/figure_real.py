"""Tables of folds of published models, measured by benchmarks/real.py."""

import statistics
from collections.abc import Sequence
from typing import Any

from figure_data import load
from figure_tables import Block, number, percent, table

NAMES = {
    "original": "original",
    "absorb": "absorb, no refit",
    "absorb+refit": "**absorb with refit (default)**",
    "absorb+refit by block": "default with `--refit-by block`",
    "absorb+refit+heal by block": "default, then healed block by block",
    "absorb+refit+heal": "default, then healed as a whole",
    "wide": "half as many heads of twice the head_dim",
    "unequal": "groups of different sizes",
    "unequal+heal": "the same, healed as a whole",
    "budget": "a count per layer (`--kv-budget`)",
    "mean": "mean pooling (GQA)",
    "procrustes+norm": "Procrustes with norm",
    "qcqa-ac": "QCQA-AC",
    "asymgqa": "AsymGQA",
}
"""Row of the results → as the tables call it."""


def _original(result: str) -> dict[str, Any]:
    return next(row for row in load(result)["rows"] if row["method"] == "original")


def _folds(result: str) -> list[dict[str, Any]]:
    order = list(NAMES)
    found = [row for row in load(result)["rows"] if row["method"] != "original"]
    return sorted(
        found,
        key=lambda row: (-row["kv_bytes_per_token"], order.index(row["method"]) if row["method"] in order else -1),
    )


def _name(row: dict[str, Any]) -> str:
    method, _, rest = row["method"].partition(",")
    return NAMES[method] + (f",{rest}" if rest else "") + (" †" if "made_by" in row else "")


def _transcribed(row: dict[str, Any]) -> str:
    return f"{row['transcription_seconds']:.0f} s" if "transcription_seconds" in row else ""


def _kib(size: float) -> str:
    return f"{size / 1024:g} KiB"


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else ""


def _seconds(row: dict[str, Any]) -> str:
    """Return how long a fold took; of one that went on after an interruption neither time nor memory is known."""
    if "seconds" not in row:
        return ""
    said = f"{row['seconds']:.0f}" + ("" if "calibrate" in row["stages"] else " + calibration")
    return said + (" (beside other jobs)" if "beside_other_jobs" in row else "")


def language_model(result: str, contexts: Sequence[int]) -> str:
    """Loss increase by context, divergence, and the peak memory and seconds of the fold."""
    keys = [f"context {context}" for context in contexts]
    losses = [f"{'' if at else 'loss increase '}at {context:,}" for at, context in enumerate(contexts)]
    header = ["fold", "K/V per token", *losses, "KL", "same top token", "memory", "seconds"]
    base = _original(result)
    lines = [
        ["original", "", *(f"(loss {number(base[key]['nll'])})" for key in keys), *[""] * 4],
        *(
            [
                _name(row), _kib(row["kv_bytes_per_token"]), *(number(row[key]["loss_increase"]) for key in keys),
                number(row[keys[0]]["kl"]), percent(row[keys[0]]["same_top_token"]),
                _memory(row), _seconds(row),
            ]
            for row in _folds(result)
        ),
    ]  # fmt: skip
    return table(header, lines)


def speech(result: str) -> str:
    """Words that differ from the original's, wrong words on another speaker, and what the fold takes."""
    base, some = _original(result), _folds(result)[0]
    a_head = some["kv_bytes_per_token"] / int(some["kv_heads"])
    header = [
        "fold", "K/V heads", "K/V per position", "other words, telephone prompts", "word error rate, another speaker",
        "80 prompts transcribed in", "memory", "seconds",
    ]  # fmt: skip
    lines = [
        ["original", "6", _kib(6 * a_head), "", percent(base["word_error_rate"]), _transcribed(base), "", ""],
        *(
            [
                _name(row), row["kv_heads"], _kib(row["kv_bytes_per_token"]), percent(row["differing_share"]),
                percent(row["word_error_rate"]), _transcribed(row), _memory(row),
                _seconds(row),
            ]
            for row in sorted(_folds(result), key=lambda row: -int(row["kv_heads"]))
        ),
    ]  # fmt: skip
    return table(header, lines)


RETRIEVED = {"passkey": "passkey", "named passkeys": "passkeys by name", "lookup": "value in a list"}


def retrieval(result: str) -> str:
    """The share of digits that a model repeats from a text, by length: of a passkey, of twelve told by name, and of a value in a list."""
    rows = load(result)["rows"]
    lengths = list(rows[0]["passkey"])
    header = ["fold", "retrieved", *(f"{int(length):,} tokens" for length in lengths)]
    lines = [
        [NAMES.get(row["model"], row["model"]), said, *(percent(row[key][length]) for length in lengths)]
        for key, said in RETRIEVED.items()
        for row in rows
        if key in row  # what was measured later is not in all results
    ]
    return table(header, lines)


def entropy(result: str) -> str:
    """The mean entropy of attention by quarter of the window, of all layers and of their last third."""
    rows = load(result)["rows"]
    header = ["fold", "window", "layers", "first quarter", "second", "third", "last"]
    lines = [
        [
            NAMES.get(row["model"], row["model"]),
            f"{int(context):,}",
            layers,
            *map(number, row["entropy"][context][layers]),
        ]
        for context in rows[0]["entropy"]
        for layers in rows[0]["entropy"][context]
        for row in rows
    ]
    return table(header, lines)


def by_quarter(result: str) -> str:
    """The loss increase by quarter of the window, on many windows."""
    header = ["fold", "windows", "loss increase", "first quarter", "second", "third", "last"]
    lines = []
    for row in _folds(result):
        for key in (key for key in row if " windows of " in key):
            parts = row[key]["loss_increase_by_position"]
            size = len(parts) // 4
            quarters = (statistics.mean(parts[at : at + size]) for at in range(0, len(parts), size))
            count, _, length = key.partition(" windows of ")
            lines.append([
                _name(row), f"{count} of {int(length):,}", number(row[key]["loss_increase"]), *map(number, quarters)
            ])  # fmt: skip
    return table(header, lines)


def encoder(result: str) -> str:
    """The cosine of the embeddings of a fold to those of the original, by the number of heads."""
    found = [row for row in load(result)["rows"] if row["method"] != "original"]
    counts = sorted({row["kv_heads"] for row in found}, key=int, reverse=True)
    by_name: dict[str, dict[str, Any]] = {}
    for row in found:
        by_name.setdefault(_name(row), {})[row["kv_heads"]] = row
    header = ["fold", *(f"{count} K/V heads" for count in counts)]
    cells = {
        name: [number(row[count]["cosine"]) if count in row else "" for count in counts]
        for name, row in by_name.items()
    }
    return table(header, [["original", *["1"] * len(counts)], *([name, *cells[name]] for name in by_name)])


SMOLLM2, WHISPER = "real-smollm2-135m-instruct", "real-whisper-tiny.en"
MINILM, MPNET = "real-all-minilm-l6-v2", "real-all-mpnet-base-v2"
LONG = "smollm2-135m-instruct-long-context"
REAL = {
    "real-language-model": Block(lambda: language_model(SMOLLM2, (1024, 2048, 8192)), (SMOLLM2,)),
    "real-quarters": Block(lambda: by_quarter(SMOLLM2), (SMOLLM2,)),
    "real-retrieval": Block(lambda: retrieval(LONG), (LONG,)),
    "real-entropy": Block(lambda: entropy(LONG), (LONG,)),
    "real-encoder": Block(lambda: encoder(MINILM), (MINILM,)),
    "real-large-encoder": Block(lambda: encoder(MPNET), (MPNET,)),
    "real-speech": Block(lambda: speech(WHISPER), (WHISPER,)),
}
