"""README and documentation tell the truth: figures come from the results, commands exist, links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import refused_words

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OLD_WORDS = re.compile(
    r"\b(?:damages?|leaders?|followers?|wide heads?|head.width|max.rise|original run)\b|--spread|headfold probe",
    re.IGNORECASE,
)


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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    lines = "\n".join(body for language, body in FENCE.findall(page.read_text()) if language == "sh")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in lines.replace("\\\n", " ").splitlines():
        command = line.partition("#")[0].strip()
        if match := re.search(r"(?:^|-m )(headfold .+)", command):
            assert refused_words(match[1]) == [], command
        elif command.startswith("make "):
            assert command.split()[1] in targets, command


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
    assert OLD_WORDS.findall(re.sub(r"<!-- figures:.*?<!-- /figures -->", "", page.read_text(), flags=re.DOTALL)) == []


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
