"""Write every figure of README.md and docs/ from benchmarks/results/, or check that none is stale.

    python scripts/figures.py            # rewrite blocks, picture and docs/figures.json
    python scripts/figures.py --check    # change nothing; name what is stale or typed by hand, and exit with 1

A page says where a figure goes, and everything between the two marks is replaced:

    <!-- figures:quality -->             a table, with the line that says where it comes from
    <!-- /figures -->

    loses <!-- figures:bundled.default.2 -->0.105<!-- /figures --> nats      a number in a sentence

Numbers with a decimal point or a unit may stand outside such marks only in code, in formulas and between
<!-- published --> and <!-- /published -->, which hold figures of papers. Everything else typed by hand is an error.
After results were only rewritten, such as by renaming their fields, --keep-commits keeps the commits of the measurements.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from figure_cache import CACHE
from figure_calibration import CALIBRATION
from figure_data import INDEX, ROOT, Index, path_of, provenance
from figure_engines import ENGINE_BLOCKS
from figure_hostile import HOSTILE
from figure_mla import LATENT
from figure_picture import svg
from figure_real import REAL
from figure_tables import TABLES
from figure_timings import BLOCKS
from figure_values import all_values

PICTURE = ROOT / "docs" / "assets" / "quality.svg"
MARKED = re.compile(r"<!-- figures:(?P<name>\S+) -->(?P<body>.*?)<!-- /figures -->", re.DOTALL)
EXEMPT = re.compile(
    r"<!-- published -->.*?<!-- /published -->"
    r"|<!-- figures:\S+ -->.*?<!-- /figures -->"
    r"|^(?P<fence>```+|~~~+).*?^(?P=fence)"
    r"|<!--.*?-->|\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]*`|\]\([^)]*\)|https?://\S+"
    r"|\b\d{4}\.\d{5}\b"
    r"|\b(?:Python|torch|transformers|version|Apache(?:-| Licen[cs]e, Version )|Keep a Changelog) ?\d+(?:\.\d+)+",
    re.DOTALL | re.MULTILINE,
)
TYPED = re.compile(
    r"\d[\d,]*\.\d+"
    r"|\b\d[\d,]*(?: ?%| (?:ms|milliseconds|seconds|minutes|times|nats|points|BLEU|[KMG]i?B|tokens (?:per|a) second)\b)"
    r"|(?<!\w)1/\d{2,}"
)
BY_NAME = {**REAL, **ENGINE_BLOCKS, **TABLES, **BLOCKS, **HOSTILE, **CALIBRATION, **CACHE, **LATENT}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def results() -> list[Path]:
    """Every file that a block reads, once."""
    return sorted({path_of(name) for block in BY_NAME.values() for name in block.results})


def filled(text: str, index: Index, where: Path) -> tuple[str, list[str]]:
    """The page with every figure as the results have it, and the names of those that were not so."""
    values, changed = all_values(), []

    def replace(found: re.Match[str]) -> str:
        name, body = found["name"], found["body"]
        if name in BY_NAME:
            block = BY_NAME[name]
            made = f"\n{block.made()}\n\n{provenance(block.results, index)}\n"
        elif name in values:
            made = values[name]()
        else:
            known = ", ".join(sorted([*BY_NAME, *values]))
            raise SystemExit(f"{where.relative_to(ROOT)}: no figure is called {name}; known: {known}")
        if made != body:
            changed.append(name)
        return f"<!-- figures:{name} -->{made}<!-- /figures -->"

    return MARKED.sub(replace, text), changed


def typed(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of every figure that stands in the prose by hand."""
    rest = EXEMPT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    for at, line in enumerate(rest.splitlines(), start=1):
        yield from ((at, found[0]) for found in TYPED.finditer(line))


def problems(index: Index) -> Iterator[str]:
    """What a check finds, one line each."""
    for path in index.stale(results()):
        yield f"{INDEX.relative_to(ROOT)}: the contents of {path.relative_to(ROOT)} changed; run make figures"
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        for block in filled(text, index, page)[1]:
            yield f"{name}: figures:{block} is not what the results say; run make figures"
        for line, figure in typed(text):
            yield f"{name}:{line}: {figure!r} is typed by hand; use a figures mark, a code span or a published block"
    if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != svg():
        yield f"{PICTURE.relative_to(ROOT)}: not what the results say; run make figures"


def write(index: Index, keep_commits: bool) -> None:
    index.refresh(results(), keep_commits)
    INDEX.write_text(index.text(), encoding="utf-8")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(svg(), encoding="utf-8")
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after, changed = filled(before, index, page)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: {', '.join(changed)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if anything is stale")
    parser.add_argument("--keep-commits", action="store_true", help="results were rewritten, not measured anew")
    options = parser.parse_args()
    index = Index()
    if not options.check:
        write(index, options.keep_commits)
    found = list(problems(index))
    print("\n".join(found), file=sys.stderr) if found else None
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
