"""List the methods: merges, groupings, grouping costs, routes and export layouts."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .. import group, merge
from ..core import plugins
from ..core.errors import UserError, suggest
from ..group import costs
from ..runtime import routes

KINDS: dict[str, tuple[ModuleType, str]] = {
    "--merge": (merge, "merge"),
    "--group": (group, "group"),
    "--group METHOD:cost=": (costs, "cost"),
    "--route": (routes, "route"),
}
"""Option of the command line → the folder of its method pages, and the name of the function on a page."""


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
        _page(option, found, package, entry)
        for option, (package, entry) in KINDS.items()
        for found in plugins.names(package)
        if name in (None, found)
    ]
    if not pages:
        known = [found for package, _ in KINDS.values() for found in plugins.names(package)]
        raise UserError(f"methods: unknown method {name!r}; {suggest(str(name), known)}")
    return pages


def _page(option: str, name: str, package: ModuleType, entry: str) -> MethodPage:
    module = plugins.load(package, name)
    options = plugins.option_defaults(getattr(module, entry))
    return MethodPage(option, name, plugins.summary(module), (module.__doc__ or "").strip(), options)
