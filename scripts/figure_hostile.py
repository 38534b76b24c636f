"""Tables of the hostile campaign and of folds larger than memory."""

from collections import Counter
from typing import Any

from figure_data import load
from figure_tables import Block, table

_KINDS = {
    "options": "values, names and number of options", "json_file": "configs, indexes, plans, tokenizers, sensitivities",
    "header": "headers of weights and statistics", "numbers": "numbers of weights and statistics", "text": "texts and tables of text",
    "lines": "JSON lines", "packed": "compressed texts, Parquet, images", "card": "model cards",
    "entry": "links, pipes, devices and directories in place of files", "planted": "files of an unfinished run, code among them",
}  # fmt: skip


def _counts(rows: list[dict[str, Any]], key: str) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(row[key], Counter())[row["ended"]] += row["cases"]
    return found


def _inputs(key: str, names: dict[str, str], title: str) -> str:
    rows = [row for row in load("robustness")["rows"] if row["group"] == "input"]
    lines = [
        [
            names.get(what, what),
            f"{counts.total():,}",
            *(f"{counts[ended]:,}" for ended in ("done", "refused", "wrong")),
        ]
        for what, counts in sorted(_counts(rows, key).items(), key=lambda item: -item[1].total())
    ]
    every = _counts([row | {"all": "all"} for row in rows], "all")["all"]
    lines.append(["all", f"{every.total():,}", *(f"{every[ended]:,}" for ended in ("done", "refused", "wrong"))])
    return table([title, "inputs", "done", "refused in a line", "anything else"], lines)


def kinds() -> str:
    return _inputs("kind", _KINDS, "what was corrupted")


def verbs() -> str:
    return _inputs("verb", {}, "verb")


def disasters() -> str:
    rows = [row for row in load("robustness")["rows"] if row["group"] != "input"]
    groups = ("kill", "race", "full disk", "interrupt")
    lines = []
    for verb in sorted({row["verb"] for row in rows}):
        of = [row for row in rows if row["verb"] == verb]
        counts = [sum(row["cases"] for row in of if row["group"] == group) for group in groups]
        lines.append([verb, *map(str, counts), str(sum(row["cases"] for row in of if row["ended"] == "wrong"))])
    total = [sum(row["cases"] for row in rows if row["group"] == group) for group in groups]
    lines.append(["all", *map(str, total), str(sum(row["cases"] for row in rows if row["ended"] == "wrong"))])
    return table(["verb", "kills", "races", "full disks", "interrupts", "anything lost or half-written"], lines)


def out_of_core() -> str:
    facts = load("out_of_core")
    lines = []
    for name, runs in facts["runs"].items():
        for layers, run in runs.items():
            lines.append([
                name, layers, f"{run['seconds']:.0f}", f"{facts['seconds_per_layer'][name]:.1f}",
                f"{run['peak_anonymous_bytes'] / 2**30:.2f} GiB",
            ])  # fmt: skip
    said = (
        f"Hidden size {facts['hidden']:,}, {facts['heads']} heads of {facts['hidden'] // facts['heads']}, bfloat16: a block has "
        f"{facts['block_bytes'] / 2**30:.2f} GiB, its attention {facts['attention_bytes'] / 2**30:.2f} GiB. "
        f"Statistics of {facts['tokens']:,} tokens."
    )
    return f"{said}\n\n{table(['job', 'layers', 'seconds', 'seconds of a further layer', 'peak of anonymous memory'], lines)}"


HOSTILE = {
    "hostile-kinds": Block(kinds, ("robustness",)),
    "hostile-verbs": Block(verbs, ("robustness",)),
    "hostile-disasters": Block(disasters, ("robustness",)),
    "out-of-core": Block(out_of_core, ("out_of_core",)),
}
