"""The house keeps its floors: imports go down only, files stay short, pages say what they are, the README tells the truth."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import jaxtyping
import pytest
from house_imports import HOUSE, Name, imported_by, imports, module_name
from typer.testing import CliRunner

import headfold.cli
import headfold.group
import headfold.group.costs
import headfold.merge
import headfold.runtime.routes
from headfold.core import plugins
from headfold.core.methods import CostMethod, GroupingMethod, MergeMethod, RouteMethod
from headfold.runtime.decoding import plain_attention

ROOT = Path(__file__).parents[1]
FLOORS = {
    1: ("core",),
    2: ("checkpoint", "parallel", "threads"),
    3: ("families", "hf_models", "outputs", "stats_file"),
    4: (
        "measure",
        "group",
        "merge",
        "descent",
        "corpus",
        "recipes",
        "rotary_tables",
        "sources",
        "towers",
        "trusted_code",
    ),
    5: ("adapted", "calibration", "divergence", "planning", "surgery"),
    6: ("answers", "head_dims", "runtime", "ct2", "graphs", "llama_cpp", "metrics"),
    7: ("adequacy", "detection", "refine", "train", "evaluate", "timing", "exports", "reports", "routing", "serving"),
    8: ("comparison", "conversion"),
    9: ("advice", "budget", "in_memory", "latent", "pages", "uptraining"),
    10: ("verbs",),
    11: ("cli",),
    12: ("__main__",),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
STAND_ALONE = {"modeling_decilm.py", "modeling_per_layer.py"}
"""Not counted with their room: each is copied as it is beside a checkpoint, so it repeats what the room could give it."""
METHOD_ROOMS = {"measure", "group", "merge"}
"""Pure pages: they see floor 1 alone."""
RUNS_MODELS = {"hf_models", "rotary_tables", "sources", "trusted_code", "adapted", "calibration"} | {
    room for floor in (6, 7, 8, 9, 10) for room in FLOORS[floor]
}
"""Rooms that may import transformers."""
MAX_FILE_LINES, MAX_ROOM_LINES, MAX_VERB_LINES = 400, 2600, 160
VERBS_THAT_CALL_OTHERS = {"compare", "demo", "report", "run"}
MODULES = sorted(HOUSE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("headfold", "tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
VERBS = (
    "demo", "inspect", "methods", "detect", "calibrate", "plan", "fold", "export", "check", "route", "uptrain", "eval", "compare",
    "frontier", "bench", "report", "run",
)  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """`headfold/group/costs/absorb.py` → `group`; the package's own `__init__` has none."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def rooms_of(names: Iterable[Name]) -> set[str]:
    """The rooms that these names lie in, on the plan or not; the version of the package lies in none."""
    return {name[1] for name in names if name[0] == "headfold" and name != ("headfold", "__version__")}


def rooms_imported(path: Path) -> set[str]:
    return rooms_of(imports(path))


def offence(room: str, other: str) -> str | None:
    """Why a room may not import another, None where it may."""
    if room == other:
        return None
    if other not in FLOOR_OF:
        return f"{other} is no room on the plan, and no public name"
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
    assert {"verbs", "reports"} <= rooms_imported(HOUSE / "cli" / "fold.py")
    assert offence("core", "families") and offence("merge", "group") and offence("merge", "checkpoint")
    assert offence("surgery", "planning") and not offence("cli", "verbs")
    assert offence("conversion", "budget") and offence("verbs", "cli") and offence("cli", "attic")


VERB = ("headfold", "verbs", "fold")
RUNTIME = ("headfold", "runtime", "load", "load")


@pytest.mark.parametrize(
    ("text", "module", "expected"),
    [
        ("import headfold.core.plan as p", "verbs.fold", {"core"}),
        ("from ..core import plan", "verbs.fold", {"core"}),
        ("def f():\n    from ...core.plan import Plan", "group.costs.absorb", {"core"}),
        ("from .absorb import cost", "group.costs.absorb", {"group"}),
        ("import headfold", "core.plan", {"verbs", "runtime"}),
        ("import headfold.core.plan", "core.heads", {"core", "verbs", "runtime"}),
        ("import headfold as h", "core.plan", {"verbs", "runtime"}),
        ("from headfold import *", "core.plan", {"verbs", "runtime"}),
        ("from headfold import fold", "core.plan", {"verbs"}),
        ("from .. import eval as e", "core.plan", {"verbs"}),
        ("from . import load", "planning", {"runtime"}),
        ("from .. import __version__", "cli.fold", set()),
        ("from .. import attic", "cli.fold", {"attic"}),
        ("import headfold.attic.old as old", "cli.fold", {"attic"}),
        ("import importlib\nimportlib.import_module('headfold.cli')", "core.plan", {"cli"}),
        ("from importlib import import_module as get\nget('headfold.cli.fold')", "core.plan", {"cli"}),
        (
            "from importlib import import_module\nimport_module('..reports.card', __package__)",
            "verbs.fold",
            {"reports"},
        ),
        ("PAGE = 'headfold.verbs'\nimport_module(PAGE)", "core.plan", {"verbs"}),
        ("import_module(f'headfold.verbs.{name}')", "core.plan", {"verbs"}),
        ("import_module(f'{__package__}.{name}')", "runtime.routes.static", {"runtime"}),
        ("import_module(f'{package}.{name}')", "core.plan", set()),
        ("__import__('headfold.verbs.fold')", "core.plan", {"verbs"}),
    ],
)
def test_the_reader_sees_imports_of_every_form(text: str, module: str, expected: set[str]) -> None:
    assert rooms_of(imported_by(text, ("headfold", *module.split(".")))) == expected


def test_the_reader_finds_where_a_public_name_lives() -> None:
    """So a verb that imports another through the package is a verb that imports another."""
    assert imported_by("from headfold import plan", VERB) == {("headfold", "verbs", "plan", "plan")}
    assert {("headfold", "verbs", "plan", "plan"), RUNTIME} <= imported_by("import headfold", VERB)
    assert imported_by("from . import static", ("headfold", "runtime", "routes"), is_package=True) == {
        ("headfold", "runtime", "routes", "static")
    }


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) in FLOOR_OF], ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    assert [offence(room, other) for other in sorted(rooms_imported(path)) if offence(room, other)] == []


@pytest.mark.parametrize("path", sorted((HOUSE / "runtime" / "routes").glob("[a-z]*.py")), ids=name_of)
def test_route_pages_are_method_pages(path: Path) -> None:
    assert rooms_imported(path) == {"core"}


def imports_inside(room: str) -> dict[str, set[str]]:
    """The modules of a room, by dotted name, and which of the others each imports."""
    named = {".".join(module_name(path)): path for path in MODULES if room_of(path) == room}
    found: dict[str, set[str]] = {}
    for name, path in named.items():
        dotted = [imported for imported in imports(path) if imported[:2] == ("headfold", room)]
        # A module at any depth: importing it runs the packages around it, too.
        candidates = {".".join(parts[:length]) for parts in dotted for length in range(2, len(parts) + 1)}
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
    files = [path for path in MODULES if room_of(path) == room and path.name not in STAND_ALONE]
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


def test_annotations_of_every_module_are_checked() -> None:
    """By the import hook of `conftest.py`; a name that it does not know it would pass over in silence."""
    names = [".".join(module_name(path)) for path in MODULES if path.stem != "__main__"]
    loaders = {name: find_spec(name).loader for name in names}
    assert [name for name, loader in loaders.items() if not type(loader).__module__.startswith("jaxtyping.")] == []
    with pytest.raises(jaxtyping.TypeCheckError):
        plain_attention(None, 1, 2, 3, None)


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
