"""How the parsers behind `headfold report` are called, and the sections that show what they return."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from results import BENCH, CLASSES, EVALUATION, PAIRED, TASKS

from headfold.budget.frontier import Point
from headfold.budget.points import read_front
from headfold.checkpoint.staging import write_json
from headfold.cli.output import _finite
from headfold.comparison import MethodRow, write_rows
from headfold.core.plan import Plan
from headfold.pages import costs, grouping, layers, losses, positions, summary, texts
from headfold.pages.cards import Card, card_of
from headfold.pages.contents import Contents, Fold, Front
from headfold.pages.elements import as_script
from headfold.pages.folders import read_methods
from headfold.pages.results import read_result
from headfold.reports.card import routed_card
from headfold.verbs.evaluate import facts

SECTIONS = (summary, costs, losses, layers, positions, grouping, texts)
RESULTS = {
    "evaluation": facts(EVALUATION),
    "bench": BENCH.to_json(),
    "paired": PAIRED,
    "tasks": TASKS.to_json(),
    "classes": CLASSES.to_json(),
    "check": {
        "model": "a",
        "right": True,
        "rows": [{"engine": "vllm", "install": "i", "serve": "s", "version": "1", "kl": 0.5}],
    },
}
ROW = MethodRow("mean", 2, 4096, "nll", 2.5, 2.25, 0.25, 0.2, 1.5, 10_000_000, 65_536, 1_000_000)
POINT = Point("plan-4096.json", 4096, {"layers.0.self": 4, "layers.1.self": 2}, 0.01, 0.0125, False)


def write_pages(root: Path) -> None:
    """Write a file of each kind that a page is made of."""
    for name, found in RESULTS.items():
        write_json(root / f"{name}.json", json.loads(json.dumps(_finite(found), default=str)))
    (root / "methods").mkdir()
    write_rows(root / "methods", {}, [ROW, replace(ROW, method="first", loss_increase=-0.5)])
    (root / "front").mkdir()
    points = {
        "points": [POINT, replace(POINT, uniform=True, measured=None)],
        "rank_correlation": None,
        "site_rank_correlation": 0.5,
    }
    write_json(root / "front" / "frontier.json", json.loads(json.dumps(points, default=lambda point: _fields(point))))
    (root / "card").mkdir()
    table = "|  | original | this |\n| --- | ---: | ---: |\n| K/V cache per token | 2 KiB | 1 KiB |\n"
    text = f"---\na: b\n---\n\n# a\n\nThis is `a`.\n\n{table}\n- Verified: yes\n\n## Made by\n\n```\nheadfold fold a b\n```\n"
    (root / "card" / "README.md").write_text(
        routed_card(text, "a", "kdgqa", {"layers.0.self": (2, 2)}, {"source": "b"})
    )


def _fields(point: Point) -> dict[str, object]:
    return {name: getattr(point, name) for name in Point.__slots__}


def result(name: str) -> Callable[[Path], object]:
    return lambda folder: _shown(Contents(results=[read_result(folder / f"{name}.json")]))


def methods(folder: Path) -> object:
    return _shown(Contents(tables=[read_methods(folder / "methods")]))


def front(folder: Path) -> object:
    points, *correlations, measured = read_front(folder / "front")
    return _shown(Contents(fronts=[Front("front", "front", points, *correlations, measured)]))


def plan(folder: Path) -> object:
    return _shown(Contents(folds=[_fold(folder, Card(), Plan.load(folder / "plan.json"))]))


def card(folder: Path) -> object:
    return _shown(Contents(folds=[_fold(folder, card_of(folder / "card"), Plan.load(folder / "plan.json"))]))


def _fold(folder: Path, found: Card, plan: Plan) -> Fold:
    return Fold(folder, "fold", "text", "a", found, plan, dict.fromkeys(plan.sites, 2), None, 1000)


def _shown(contents: Contents) -> list[str]:
    """Return the sections as they stand on the page."""
    made = [section for file in SECTIONS if (section := file.section(contents)) is not None]
    return [f"{part}{as_script(section.charts)}" for section in made for part in section.parts]
