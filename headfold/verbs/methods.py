"""List the methods: merges, groupings, grouping costs and routes."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .. import group, merge
from ..core import plugins
from ..core.errors import UserError, suggest
from ..core.methods import CostMethod, GroupingMethod, MergeMethod, MethodRecord, RouteMethod
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
    """The method's own options with their defaults."""


def methods(name: str | None = None) -> list[MethodPage]:
    """Return the pages of all methods, or of those called `name`.

    Raises:
        UserError: no method has that name.
    """
    pages = [
        _page(option, found, package, kind)
        for option, (package, kind) in KINDS.items()
        for found in plugins.names(package)
        if name in (None, found)
    ]
    if not pages:
        known = sorted({found for package, _ in KINDS.values() for found in plugins.names(package)})
        raise UserError(f"methods: unknown method {name!r}; {suggest(str(name), known)}")
    return pages


def _page(option: str, name: str, package: ModuleType, kind: type[MethodRecord]) -> MethodPage:
    options = plugins.option_defaults(plugins.load(package, name, kind).function)
    return MethodPage(option, name, plugins.summary(package, name), plugins.documentation(package, name), options)
