"""README and documentation tell the truth: figures come from the results, commands exist, links lead somewhere."""

import ast
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from test_house import refused_words

from headfold.cli import app
from headfold.exports.layout import ExportLayout
from headfold.families.spec import Family

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


MODULES = sorted((ROOT / "headfold").rglob("*.py"))
OLD_NAMES = re.compile(
    r"""(?:^|_)(?:wish(?:es)?|asked|prices?|original_run|told|gone|alike|everyone|heard|dress(?:ed)?|wear(?:s|ing)?|clothes|turning
    |disguised?|reading_without|reads_queries|rigid|free_width|head_widths?|wide_heads?|max_rise|spread(?:ing)?|tasking|contrasts?
    |prob(?:e|es|ed|ing)|leaders?|followers?|damaged?|attentions)(?:_|$)""",
    re.VERBOSE,
)
"""Words that the glossary replaced, in an identifier written in snake case."""
OLD_TERMS = re.compile(
    r"""\b(?:OriginalRun|original\ run|wish(?:es)?|everyone|wearing|clothes|disguised?|rigid|free\ width|contrasts?|prob(?:es?|ed|ing)
    |leaders?|followers?|damaged?|(?:wide|narrow)\ heads?|heads?[ ]widths?|width\ of\ (?:a|the)\ heads?|max[ -]rise|tasking)\b""",
    re.VERBOSE | re.IGNORECASE,
)
"""The same in documentation, docstrings, comments and messages, without what plain English uses in other senses (asked, gone …)."""
ALLOWED_NAMES = {
    "probe": "the former name of detect, an alias for one release",
    "HeadWidth": "the former option --head-width, an alias for one release",
    "head_width": "the same",
    "max_rise": "the former option --max-rise, an alias for one release",
    "spread": "the former option --spread, an alias for one release",
    "wait_for_everyone": "a method of accelerate",
    "output_attentions": "an argument that transformers passes to the forward of an attention module",
    "attentions": "a field of family literals, and the attention implementations of bench, as transformers names them",
    "ATTENTIONS": "the default of the latter",
    "_attentions": "the checked names of the latter",
}
"""Identifier → why it stays."""
TEXTS = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
"""Tokens that hold text; Python 3.12 and later divide f-strings into several."""
ALLOWED_TERMS: dict[str, set[str]] = {
    "headfold/cli/__init__.py": {"probe"},
    "headfold/cli/detect.py": {"probe"},
    "headfold/cli/plan.py": {"max-rise"},
}
"""File → the terms that are allowed there: former names of commands and options, aliases for one release."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def figures(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(cwd / "scripts/figures.py"), *words], cwd=cwd, capture_output=True, text=True
    )


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_000


def test_figures_are_those_of_the_results() -> None:
    ran = figures("--check")
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of what the figures are made of and written to, outside of any repository."""
    for part in ("README.md", "docs", "scripts", "benchmarks/results"):
        target = tmp_path / part
        for path in [ROOT / part] if (ROOT / part).is_file() else (ROOT / part).rglob("*"):
            if path.is_file() and path.suffix in {".md", ".json", ".svg", ".py"}:
                place = target if (ROOT / part).is_file() else target / path.relative_to(ROOT / part)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(path.read_bytes())
    return tmp_path


def test_a_check_finds_what_is_stale_or_typed(copied: Path) -> None:
    """It needs no history, names the block, and what is written anew passes."""
    assert figures("--check", cwd=copied).returncode == 0
    page = copied / "docs/results/budgets.md"
    page.write_text(page.read_text().replace("| bundled model |", "| model |") + "\nIt loses 0.123 nats.\n")
    ran = figures("--check", cwd=copied)
    assert ran.returncode == 1
    assert "docs/results/budgets.md: figures:rank-correlations" in ran.stderr and "'0.123'" in ran.stderr
    page.write_text(page.read_text().replace("0.123 nats", "little"))
    assert figures(cwd=copied).returncode == 0 and figures("--check", cwd=copied).returncode == 0
    assert page.read_text() == (DOCS / "results/budgets.md").read_text() + "\nIt loses little.\n"


def test_a_check_finds_new_results(copied: Path) -> None:
    results = copied / "benchmarks/results/plan_time.json"
    results.write_text(results.read_text().replace("44.5", "45.5"))
    ran = figures("--check", cwd=copied)
    assert ran.returncode == 1 and "plan_time.json" in ran.stderr and "figures:plan-time" in ran.stderr


def commands(page: Path) -> list[str]:
    lines = "\n".join(body for language, body in FENCE.findall(page.read_text()) if language == "sh")
    return [line.partition("#")[0].strip() for line in lines.replace("\\\n", " ").splitlines()]


def headfold_commands(page: Path) -> list[str]:
    found = (re.search(r"(?:^|-m )(headfold .+)", command) for command in commands(page))
    return [match[1] for match in found if match]


def parses(command: str) -> bool:
    """Whether the command line takes a line that starts with `headfold`: its verb, arguments, options and the types of their values."""
    _, verb, *words = shlex.split(command)
    verbs = typer.main.get_command(app).commands
    if verb.startswith("-") or verb not in verbs:
        return verb.startswith("-")
    try:
        verbs[verb].make_context(verb, words)
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:  # that of a wrong command line
            raise
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in headfold_commands(page):
        assert refused_words(command) == [], command
        assert parses(command), command
    for command in commands(page):
        if command.startswith("make "):
            assert command.split()[1] in targets, command


def test_a_wrong_command_is_seen() -> None:
    right = "headfold fold my-model OUT --kv-heads 1/2"
    wrong = (
        "headfold fold my-model",
        f"{right} --seed one",
        f"{right} --no-such-option",
        "headfold unfold my-model OUT",
    )
    assert parses(right) and not any(map(parses, wrong))


def test_plans_within_a_budget_are_given_statistics() -> None:
    planned = [
        command
        for page in PAGES
        for command in headfold_commands(page)
        if re.match("headfold plan .*--(kv-budget|kv-bytes|max-loss-increase)", command)
    ]
    assert len(planned) >= 4
    assert [command for command in planned if "--stats" not in command] == []


RECORD_PAGES: dict[str, tuple[str, str, Any]] = {
    "family": ("headfold.families", "FAMILY", Family),
    "layout": ("headfold.exports.layouts", "LAYOUT", ExportLayout),
}
"""Page in docs/extend → where its example is saved, and the record in which it ends."""


def example(page: str) -> str:
    """The first file of Python on a page of docs/extend."""
    blocks = FENCE.findall((DOCS / "extend" / f"{page}.md").read_text())
    return next(body for language, body in blocks if language == "python" and body.startswith('"""'))


@pytest.mark.parametrize("page", RECORD_PAGES)
def test_an_example_of_a_file_makes_its_record(page: str) -> None:
    package, constant, kind = RECORD_PAGES[page]
    made = {"__package__": package, "__name__": f"{package}.example"}
    exec(example(page), made)
    assert isinstance(made[constant], kind)


def test_lines_of_tiny_configs_are_those_of_the_tests() -> None:
    blocks = FENCE.findall((DOCS / "extend/family.md").read_text())
    quoted = [line for language, body in blocks if language == "python" for line in body.splitlines()]
    quoted = [line for line in quoted if re.match(r'    "\w+": |FLOAT32_NORMS', line)]
    assert len(quoted) == 4
    assert set(quoted) <= set((ROOT / "tests/tiny.py").read_text().splitlines())


def test_the_example_of_a_merge_is_the_one_that_is_tested() -> None:
    in_package = (ROOT / "examples/merges/largest.py").read_text().replace("from headfold.", "from ..")
    assert example("method") == in_package


def test_seeds_that_a_script_fixes_are_recorded() -> None:
    """A results file with `seeds` is written by a script that records them, and the tables say which ones."""
    results = ROOT / "benchmarks/results"
    recorded = [path.stem for path in sorted(results.glob("*.json")) if "seeds" in json.loads(path.read_text())]
    scripts = {name: ROOT / f"benchmarks/{name.removeprefix('pylib-llama-')}.py" for name in recorded}
    assert len(recorded) >= 5 and all('"seeds": ' in script.read_text() for script in scripts.values())
    text = "".join(path.read_text() for path in (DOCS / "results").glob("*.md"))
    for name in recorded:
        line = next(line for line in text.splitlines() if line.startswith(f"*Results: `{name}.json`"))
        listed = ", ".join(map(str, json.loads((results / f"{name}.json").read_text())["seeds"]))
        assert re.search(rf"Seeds: the fixed seeds? {listed}\.", line)


@pytest.mark.parametrize("page", ["family", "layout"])
def test_the_files_to_touch_exist(page: str) -> None:
    """Those in the table at the top of a page; `<name>` is any page of a folder that has some."""
    listed = re.findall(r"^\| `((?:headfold|tests)/\S+)` \|", (DOCS / f"extend/{page}.md").read_text(), re.MULTILINE)
    assert len(listed) >= 4
    assert [path for path in listed if not list(ROOT.glob(re.sub(r"<\w+>", "[a-z]*", path)))] == []


def test_docstrings_hold_no_measured_figures() -> None:
    """A loss or a share of one with four digits or more is a result, which belongs into benchmarks/results and a figures mark."""
    measured = re.compile(r"\b(?!\d{4}\.\d{4,5}\b)\d+\.\d{4,}\b|\b\d+ k tokens\b")
    assert measured.search("ended at a loss increase of 0.0387") and not measured.search("GQA (2305.13245), 0.95, 2.13")
    strings = [
        (path, node.value)
        for path in sorted((ROOT / "headfold").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [(name_of(path), found[0]) for path, text in strings if (found := measured.search(text))] == []


def test_the_records_of_the_reference_are_there() -> None:
    assigned = {
        ast.unparse(node.targets[0]): node.value
        for node in ast.parse((ROOT / "scripts/docs_pages.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    for path in ast.literal_eval(assigned["RECORDS"]):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__module__ == module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [target for target in targets if target and "://" not in target and not (page.parent / target).exists()]
    # The pages of the project are in the root, and MkDocs includes them.
    assert [
        target for target in missing if not (ROOT / Path(target).name.replace("contributing", "CONTRIBUTING")).exists()
    ] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=name_of)
def test_the_words_are_those_of_the_glossary(page: Path) -> None:
    written = re.sub(r"<!-- figures:.*?<!-- /figures -->", "", page.read_text(), flags=re.DOTALL)
    assert OLD_TERMS.findall(written) == [] and "--spread" not in written


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Yield every name that the source defines or reads: variables, arguments, attributes, functions, classes, modules."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(found := getattr(node, field, None), str):
                yield from found.split(".")


def old_names(source: str) -> set[str]:
    names = set(identifiers(ast.parse(source)))
    return {name for name in names if OLD_NAMES.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())}


def old_terms(source: str) -> list[str]:
    """The old terms in a source's text beside its identifiers: strings (with docstrings and messages) and comments."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in TEXTS:
            found += OLD_TERMS.findall(" ".join(token.string.split()))
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_uses_the_words_of_the_glossary(path: Path) -> None:
    source = path.read_text()
    assert old_names(source) - ALLOWED_NAMES.keys() == set()
    assert [term for term in old_terms(source) if term not in ALLOWED_TERMS.get(name_of(path), ())] == []


def test_old_words_are_found() -> None:
    source = """class OriginalRun:
    'A follower.'
    def dress(self, heads_alike): return f"probe {self} of wide heads"  # by the leader
    """
    assert old_names(source) == {"OriginalRun", "dress", "heads_alike"}
    assert old_terms(source) == ["follower", "probe", "wide heads", "leader"]


def test_allowed_words_are_used() -> None:
    used = {name for path in MODULES for name in identifiers(ast.parse(path.read_text()))}
    assert ALLOWED_NAMES.keys() <= used
    assert all(set(old_terms((ROOT / path).read_text())) == terms for path, terms in ALLOWED_TERMS.items())


def test_the_floor_plan_is_true() -> None:
    """Every room of the tree in docs/architecture.md is there, on the floor that it says."""
    tree = next(
        body for _, body in FENCE.findall((DOCS / "architecture.md").read_text()) if body.startswith("headfold/")
    )
    rooms = re.findall(r"^  ([a-z_]+(?:\.py|/)) +(\d+) ", tree, re.MULTILINE)
    assert len(rooms) > 20
    assert [name for name, _ in rooms if not (ROOT / "headfold" / name).exists()] == []
    from test_house import FLOOR_OF

    assert {name: FLOOR_OF[name.removesuffix(".py").rstrip("/")] for name, _ in rooms} == {
        name: int(at) for name, at in rooms
    }
