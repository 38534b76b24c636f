"""headfold methods."""

from dataclasses import asdict
from typing import Annotated

import typer

from .options import Debug, Json
from .output import answered

EXAMPLES = ("headfold methods", "headfold methods absorb")


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method or layout, to show its whole page.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods and export layouts, or show the page of one."""
    from ..reports import views
    from ..verbs import methods as verb

    pages = verb.methods(name)
    if answered({"methods": [asdict(page) for page in pages]}, as_json):
        return
    if name is None:
        options = dict.fromkeys(page.option for page in pages)
        views.show_methods({option: {p.name: p.summary for p in pages if p.option == option} for option in options})
    for page in pages if name else []:
        views.show_page(page.option, page.name, page.page, page.options)
