"""The tables of docs/papers.md, written there from the results: each between its marks, the prose around them by hand.

python -m benchmarks.papers.tables
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "papers.md"
SIGNED = ("−", "+")


def number(value: float | None, places: int, signed: bool = False) -> str:
    if value is None:
        return ""
    sign = SIGNED[value >= 0] if signed else "−" if value < 0 else ""
    return f"{sign}{abs(value):.{places}f}"


def plus_minus(found: dict[str, float] | None, places: int, signed: bool = False) -> str:
    """Mean ± standard deviation; a mean alone where there is one seed, and the number of seeds where they are two."""
    if not found:
        return ""
    mean, seeds = number(found["mean"], places, signed), found["seeds"]
    return mean + (f" ± {found['sd']:.{places}f}" if seeds > 1 else "") + (f" ({seeds})" if seeds < 3 else "")


def published(value: Any) -> str:
    return " / ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def rates(row: dict[str, Any]) -> str:
    """Losses on validation by rate, the smallest rate first."""
    tried = row.get("validation_nll_by_rate", {})
    return ", ".join(f"{float(rate):g}: {tried[rate]:.3f}" for rate in sorted(tried, key=float))


def wgqa(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["row", "published BLEU / R1 / R1", "BLEU before", "BLEU trained", "loss before", "loss trained", "over the plain fold's",
           "validation loss by rate, seed 0"]  # fmt: skip
    for row in found["rows"]:
        over = next((row[name] for name in row if name.startswith("nll_over")), None)
        yield [row["row"], published(row["published"]), number(row["bleu_before"], 1), plus_minus(row["bleu"], 1),
               number(row["nll_before"], 3), plus_minus(row["nll"], 3), plus_minus(over, 4, signed=True), rates(row)]  # fmt: skip


def routes(found: dict[str, Any]) -> Iterator[list[str]]:
    yield [
        "row",
        "published run, from scratch, %",
        "accuracy before, %",
        "accuracy trained, %",
        "cross-entropy trained",
    ]
    for row in found["rows"]:
        yield [row["row"], published(row["published"]), number(row["accuracy_before"], 1),
               plus_minus(row.get("accuracy"), 1), plus_minus(row.get("cross_entropy"), 3)]  # fmt: skip


def uptraining(found: dict[str, Any]) -> Iterator[list[str]]:
    shares = found["settings"]["shares"]
    first, last = shares[0], shares[-1]
    yield [
        "row",
        *(f"loss at {share:g}" for share in shares),
        f"BLEU at {first:g}",
        f"BLEU at {last:g}",
        "validation loss by rate, seed 0",
    ]
    for row in found["rows"]:
        losses = [plus_minus(row["nll"].get(str(share)), 3) for share in shares]
        ends = [plus_minus(row["bleu"].get(str(share)), 1) for share in (first, last)]
        yield [row["row"], *losses, *ends, rates(row)]


def groupings(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["row", "BLEU before", "BLEU trained", "loss before", "loss trained", "validation loss by rate, seed 0"]
    for row in found["rows"]:
        yield [row["row"], number(row["bleu_before"], 1), plus_minus(row["bleu"], 1), number(row["nll_before"], 3),
               plus_minus(row["nll"], 3), rates(row)]  # fmt: skip


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[list[str]]]] = {
    "wgqa-multi30k-t5": wgqa,
    "routes-cifar10-vit": routes,
    "uptraining-multi30k-t5": uptraining,
    "groupings-multi30k-t5": groupings,
}


def markdown(rows: Iterator[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * (lines[0].count("|") - 1), *lines[1:]])


def main() -> None:
    page = PAGE.read_text()
    for name, table in TABLES.items():
        file = ROOT / "benchmarks" / "results" / f"papers-{name}.json"
        made = markdown(table(json.loads(file.read_text()))) if file.exists() else "Not run yet."
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page:
            raise SystemExit(f"{PAGE}: expected the mark {begin}, found none")
        page = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, a=begin, m=made, b=end: f"{a}\n{m}\n{b}",
            page,
            flags=re.S,
        )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
