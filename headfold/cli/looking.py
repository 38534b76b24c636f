"""Verbs that look: inspect, probe, methods."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..report import views
from .answers import answer
from .options import Debug, Force, Json, Model, StatsFile

if TYPE_CHECKING:
    from ..core.methods import MethodRecord


def inspect(model: Model, stats: StatsFile = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show heads, cache size and the predicted cost of folding.

    The strips show, layer by layer, the error predicted for keeping 1/2, 1/4 and 1/8 of the K/V heads."""
    from .. import recipe

    found = recipe.inspect(model, stats=stats)
    answer(found.to_json(), as_json) or views.show_inspection(found)


def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a hub id or a model_type of transformers.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FAMILY.py", help="Write the literal as Python source.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find an architecture's attention and prove it foldable.

    A toy model with random weights is built from the config. Its projections are found, every freedom of K, V and the order of heads
    is tried on it, and the literal that follows must pass all laws."""
    from ..recipe import probing

    found = probing.probe(model, out=out, force=force)
    answer(found.to_json(), as_json) or views.show_probe(found, out)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, for its whole page.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods, or show the page of one."""
    from .. import group, merge
    from ..core import plugins
    from ..core.methods import CostMethod, GroupingMethod, MergeMethod, RouteMethod
    from ..group import costs
    from ..runtime import routes

    axes: dict[str, tuple[ModuleType, type[MethodRecord]]] = {
        "--merge": (merge, MergeMethod),
        "--group": (group, GroupingMethod),
        "--group METHOD:cost=": (costs, CostMethod),
        "--route": (routes, RouteMethod),
    }
    pages = [
        _page(option, package, found, kind)
        for option, (package, kind) in axes.items()
        for found in plugins.names(package)
        if name in (None, found)
    ]
    if not pages:
        plugins.load(merge, name or "", MergeMethod)  # refuses, suggesting near names
    if answer({"methods": pages}, as_json):
        return
    if name is None:
        views.show_methods(
            {option: {p["name"]: p["summary"] for p in pages if p["option"] == option} for option in axes}
        )
    for page in pages if name else []:
        views.show_page(page["option"], page["name"], page["page"], page["options"])


def _page(option: str, package: ModuleType, name: str, kind: "type[MethodRecord]") -> dict[str, Any]:
    from ..core import plugins

    page = plugins.documentation(package, name)
    defaults = plugins.option_defaults(plugins.load(package, name, kind).function)
    return {
        "option": option,
        "name": name,
        "summary": plugins.summary(package, name),
        "page": page,
        "options": defaults,
    }
