"""The house keeps its floors: imports go down only, files stay short, pages say what they are, the README tells the truth."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import headfold.cli
import headfold.group
import headfold.group.costs
import headfold.merge
import headfold.runtime.routes
from headfold.core import plugins
from headfold.core.methods import CostMethod, GroupingMethod, MergeMethod, RouteMethod

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "headfold"
FLOORS = {
    1: ("core",),
    2: ("checkpoint", "parallel"),
    3: ("families", "hf_models"),
    4: ("measure", "group", "merge", "corpus"),
    5: ("calibration", "planning", "surgery"),
    6: ("runtime",),
    7: ("detection", "refine", "train", "evaluate", "timing", "exports", "report"),
    8: ("conversion",),
    9: ("budget",),
    10: ("verbs",),
    11: ("cli",),
    12: ("__main__",),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
METHOD_ROOMS = {"measure", "group", "merge"}
"""Pure pages: they see floor 1 alone."""
RUNS_MODELS = {"hf_models", "calibration"} | {room for floor in (6, 7, 8, 9, 10) for room in FLOORS[floor]}
"""Rooms that may import transformers."""
MAX_FILE_LINES, MAX_ROOM_LINES, MAX_VERB_LINES = 400, 2500, 160
VERBS_THAT_CALL_OTHERS = {"compare", "demo"}
MODULES = sorted(HOUSE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("headfold", "tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
VERBS = (
    "demo", "inspect", "methods", "detect", "calibrate", "plan", "fold", "export", "route", "uptrain", "eval", "compare", "frontier",
    "bench",
)  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """`headfold/group/costs/absorb.py` → `group`; the package's own `__init__` has none."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The absolute dotted name of everything that a module imports, wherever in it: in functions and for types too."""
    package = ("headfold", *path.relative_to(HOUSE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    return {name[1] for name in imports(path) if name[0] == "headfold" and len(name) > 1 and name[1] in FLOOR_OF}


def offence(room: str, other: str) -> str | None:
    """Why a room may not import another, None where it may."""
    if room == other:
        return None
    if FLOOR_OF[other] >= FLOOR_OF[room]:
        return f"floor {FLOOR_OF[room]} imports {other} of floor {FLOOR_OF[other]}"
    if room in METHOD_ROOMS and FLOOR_OF[other] > 1:
        return f"a method page imports {other}; it sees floor 1 alone"
    return None


def test_every_room_is_on_the_plan() -> None:
    rooms = {room_of(path) for path in MODULES} - {"__init__", "bundled"}
    assert rooms <= FLOOR_OF.keys()


def test_the_law_can_be_broken() -> None:
    """The reader sees imports of every form, and the table refuses what it must."""
    assert rooms_imported(HOUSE / "group" / "costs" / "absorb.py") == {"core"}
    assert {"verbs", "report"} <= rooms_imported(HOUSE / "cli" / "fold.py")
    assert offence("core", "families") and offence("merge", "group") and offence("merge", "checkpoint")
    assert offence("surgery", "planning") and not offence("cli", "verbs")
    assert offence("conversion", "budget") and offence("verbs", "cli")


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) in FLOOR_OF], ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    assert [offence(room, other) for other in sorted(rooms_imported(path)) if offence(room, other)] == []


def imports_inside(room: str) -> dict[str, set[str]]:
    """The modules of a room, by dotted name, and which of the others each imports."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in MODULES if room_of(p) == room}
    named = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    found: dict[str, set[str]] = {}
    for name, path in named.items():
        dotted = [imported for imported in imports(path) if imported[:2] == ("headfold", room)]
        candidates = {".".join(parts[:length]) for parts in dotted for length in (len(parts) - 1, len(parts))}
        # A package imports its pages when they are asked for; what it imports to describe them is no step back up.
        found[name] = {c for c in candidates & named.keys() if c != name and not name.startswith(f"{c}.")}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules that cannot be put into an order in which each imports only earlier ones."""
    left = dict(graph)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_the_files_of_a_room_have_an_order(room: str) -> None:
    assert circle(imports_inside(room)) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert imports_inside("conversion")["headfold.conversion.teacher"] >= {"headfold.conversion.source"}


def test_only_some_verbs_call_others() -> None:
    callers = {name.rpartition(".")[2] for name, needed in imports_inside("verbs").items() if needed}
    assert callers == VERBS_THAT_CALL_OTHERS


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_rooms_are_small(room: str) -> None:
    """Without `modeling_*.py`, which are copied into what is written."""
    files = [p for p in MODULES if room_of(p) == room and not p.name.startswith("modeling_")]
    assert sum(len(p.read_text().splitlines()) for p in files) <= MAX_ROOM_LINES


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) == "verbs"], ids=name_of)
def test_a_verb_is_told_on_a_few_screens(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_VERB_LINES


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) not in RUNS_MODELS], ids=name_of)
def test_transformers_stays_where_models_run(path: Path) -> None:
    assert "transformers" not in {name[0] for name in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short_and_named_for_something(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
    assert not re.search(r"\b(TO[D]O|FIX[M]E)\b", text)


@pytest.mark.parametrize("path", [p for p in MODULES if p.stat().st_size], ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


PAGES = [
    (package, name)
    for package in (headfold.merge, headfold.group, headfold.group.costs, headfold.runtime.routes)
    for name in plugins.names(package)
]


@pytest.mark.parametrize(("package", "name"), PAGES, ids=lambda value: getattr(value, "__name__", value))
def test_method_pages_have_a_help_line(package: ModuleType, name: str) -> None:
    line = plugins.summary(package, name)
    assert line and line[0].isupper() and len(line) <= 140


RECORDS = {
    headfold.merge: ("MERGE", MergeMethod),
    headfold.group: ("GROUPING", GroupingMethod),
    headfold.group.costs: ("COST", CostMethod),
    headfold.runtime.routes: ("ROUTE", RouteMethod),
}


@pytest.mark.parametrize(("package", "name"), PAGES, ids=lambda value: getattr(value, "__name__", value))
def test_method_pages_end_in_one_record(package: ModuleType, name: str) -> None:
    constant, kind = RECORDS[package]
    *_, last = ast.parse(Path(package.__path__[0], f"{name}.py").read_text()).body
    assert isinstance(last, ast.Assign) and ast.unparse(last.targets[0]) == constant
    record = plugins.load(package, name, kind)
    assert record.function.__name__ == fields(kind)[0].name


@pytest.mark.parametrize("name", plugins.names(headfold.merge))
def test_merges_name_their_source(name: str) -> None:
    """A paper by its arXiv number, or the equations they solve."""
    assert re.search(r"\b\d{4}\.\d{5}\b|docs/absorb\.md|[Ee]quation", plugins.documentation(headfold.merge, name))


def help_of(*verb: str) -> str:
    result = CliRunner().invoke(headfold.cli.app, [*verb, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return result.stdout


def refused_words(command: str) -> list[str]:
    """What of a shell line starting with `headfold` the command line does not know: the verb, or its long options."""
    words = command.split()[1:]
    if words and words[0] not in VERBS:
        return [word for word in words[:1] if f"{word} " not in help_of()]
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    known = set(re.findall(r"--[a-z-]+", help_of(words[0])))
    return sorted(options - known)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_a_true_example(verb: str) -> None:
    text = help_of(verb)
    examples = re.findall(r"Example: (headfold .+)", text)
    assert len(examples) == 2 and all(example.split()[1] == verb for example in examples)
    assert [word for example in examples for word in refused_words(example)] == []
    assert "--json" in text and "--debug" in text


def test_verbs_are_all_listed() -> None:
    listed = re.findall(r"^│ ([a-z]+) {2,}\S", help_of(), re.MULTILINE)
    assert sorted(listed) == sorted(VERBS)
    assert help_of("probe").count("Detect") == 1  # the former name still works


def readme_commands() -> list[str]:
    blocks = re.findall(
        r"^```(?:sh|console|bash)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.strip()]


def test_readme_commands_exist() -> None:
    commands = readme_commands()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"make test", "make demo"} <= set(commands)
    assert any(command.startswith("headfold fold") for command in commands)
    assert refused_words("headfold fold a b --no-such-option") == ["--no-such-option"]
    for command in commands:
        if command.startswith("make "):
            assert command.split()[1] in targets, command
        elif command.startswith("headfold "):
            assert refused_words(command) == [], command


@pytest.mark.parametrize("module", ["headfold", "headfold.cli"])
def test_start_up_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'rich'}} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_public_names_are_no_submodules() -> None:
    """A submodule would take the place of the function of its name."""
    rooms = {path.stem if path.suffix == ".py" else path.name for path in HOUSE.iterdir()}
    assert not rooms & set(headfold.__all__)
    assert {"eval" if path.stem == "evaluate" else path.stem for path in (HOUSE / "verbs").glob("[a-z]*.py")} | {
        "load", "__version__",
    } == set(headfold.__all__)  # fmt: skip
    assert all(callable(getattr(headfold, name)) for name in headfold.__all__ if name != "__version__")
