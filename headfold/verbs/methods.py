"""List the methods: merges, groupings, grouping costs, routes, export layouts and engine formats."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .. import group, merge
from ..core import plugins
from ..core.errors import UserError, suggest
from ..core.methods import CostMethod, GroupingMethod, MergeMethod, MethodRecord, RouteMethod
from ..exports import engines, layouts
from ..exports.formats import EngineFormat, engine_formats
from ..exports.layout import ExportLayout, export_layouts
from ..group import costs
from ..runtime import routes

KINDS: dict[str, tuple[ModuleType, type[MethodRecord]]] = {
    "--merge": (merge, MergeMethod),
    "--group": (group, GroupingMethod),
    "--group METHOD:cost=": (costs, CostMethod),
    "--route": (routes, RouteMethod),
}
"""Option of the command line → the folder of its method pages, and the record that each page ends in."""


@dataclass(frozen=True, slots=True)
class MethodPage:
    """One method as its file describes it."""

    option: str
    name: str
    summary: str
    page: str
    options: dict[str, Any]
    """The method's own options with their defaults; a layout has none."""


def methods(name: str | None = None) -> list[MethodPage]:
    """Return the pages of all methods and layouts, or of those called `name`.

    Raises:
        UserError: no method has that name.
    """
    pages = [
        _page(option, found, package, kind)
        for option, (package, kind) in KINDS.items()
        for found in plugins.names(package)
        if name in (None, found)
    ]
    pages += [_layout_page(layout) for layout in export_layouts().values() if name in (None, layout.name)]
    pages += [_format_page(found) for found in engine_formats().values() if name in (None, found.name)]
    if not pages:
        known = {found for package, _ in KINDS.values() for found in plugins.names(package)}
        known |= export_layouts().keys() | engine_formats().keys()
        raise UserError(f"methods: unknown method {name!r}; {suggest(str(name), sorted(known))}")
    return pages


def _page(option: str, name: str, package: ModuleType, kind: type[MethodRecord]) -> MethodPage:
    options = plugins.option_defaults(plugins.load(package, name, kind).function)
    return MethodPage(option, name, plugins.summary(package, name), plugins.documentation(package, name), options)


def _layout_page(layout: ExportLayout) -> MethodPage:
    """Return the page of a layout: the docstring of its file, and what its record declares."""
    file = layout.name.replace("-", "_")
    needs = [
        "the same number of K/V heads in all layers" if layout.needs_one_count else "",
        "groups of one size in each layer" if layout.needs_equal_groups else "",
    ]
    facts = [
        f"Model types: {', '.join(layout.model_types)}.",
        f"Needs: {' and '.join(filter(None, needs)) or 'nothing else of the fold'}.",
        "Written only if it is asked for." if layout.priority is None else "Written by fold where it fits.",
    ]
    page = f"{plugins.documentation(layouts, file)}\n\n{' '.join(facts)}"
    return MethodPage("--layout", layout.name, plugins.summary(layouts, file), page, {})


def _format_page(found: EngineFormat) -> MethodPage:
    """Return the page of an engine format: the docstring of its file, and what its record declares."""
    facts = [
        f"Model types: {', '.join(found.model_types)}.",
        f"{f'One file whose name ends in {found.suffix}' if found.suffix else 'A directory'}, which headfold export writes.",
        f"--quantise: {', '.join(found.number_types)}.",
    ]
    page = f"{plugins.documentation(engines, found.name)}\n\n{' '.join(facts)}"
    return MethodPage("--layout", found.name, plugins.summary(engines, found.name), page, {})
