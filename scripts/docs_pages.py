"""Fill the generated parts of the documentation while MkDocs builds it: command line, Python, methods and families, from the code.

A page says `<!-- generated:NAME -->` where a part goes. Formulas are turned into MathML, so that pages need no script for them.
"""

import dataclasses
import html
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import latex2mathml.converter
import typer
import typer.main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RECORDS = (
    "headfold.core.heads.Heads",
    "headfold.core.heads.KeyFreedom",
    "headfold.core.groups.Groups",
    "headfold.core.stats.SiteStats",
    "headfold.core.plan.Plan",
    "headfold.core.plan.SitePlan",
    "headfold.families.spec.Family",
    "headfold.families.spec.Attention",
    "headfold.families.spec.Rope",
    "headfold.families.spec.Site",
    "headfold.core.methods.MergeMethod",
    "headfold.core.methods.GroupingMethod",
    "headfold.core.methods.CostMethod",
    "headfold.core.methods.RouteMethod",
    "headfold.exports.layout.ExportLayout",
)
"""What plans, families, methods and layouts are made of."""
MARK = re.compile(r"^<!-- generated:(\w+) -->$", re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def plain(text: str | None) -> str:
    """Help text as one paragraph of Markdown."""
    escaped = " ".join((text or "").split())
    return re.sub(r"([<>*_|\[\]])", r"\\\1", escaped)


def long_text(text: str | None) -> str:
    return "\n\n".join(plain(part) for part in (text or "").split("\n\n"))


def cli() -> str:
    """Every verb of the command line: help, arguments, and options by panel."""
    from headfold.cli import app

    root = typer.main.get_command(app)
    verbs = {name: verb for name, verb in root.commands.items() if not getattr(verb, "hidden", False)}
    return "\n\n".join(_verb(name, verb) for name, verb in verbs.items())


def _verb(name: str, verb: Any) -> str:
    parts = [f"## headfold {name}", long_text(inspect.cleandoc(verb.help or ""))]
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    usage = " ".join(["headfold", name, "[OPTIONS]", *(p.metavar or p.name.upper() for p in arguments)])
    parts.append(f"```\n{usage}\n```")
    panels: dict[str, list[str]] = {}
    for parameter in verb.params:
        if getattr(parameter, "hidden", False):
            continue
        is_argument = parameter.param_type_name == "argument"
        panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
        panels.setdefault(panel, []).append(_parameter(parameter, is_argument))
    for panel, lines in panels.items():
        parts.append("\n".join([f"**{panel}**", "", "| name | meaning |", "| --- | --- |", *lines]))
    examples = re.findall(r"headfold .+", getattr(verb, "epilog", None) or "")
    if examples:
        parts.append("```sh\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts)


def _parameter(parameter: Any, is_argument: bool) -> str:
    earlier = [] if is_argument else [f"`{name}`" for name in parameter.opts[1:] if name.startswith("--")]
    names = (
        [parameter.metavar or parameter.name.upper()] if is_argument else parameter.opts[:1] + parameter.secondary_opts
    )
    value = (
        ""
        if is_argument or parameter.is_flag
        else f" {parameter.metavar or ('N' if isinstance(parameter.default, int) else 'VALUE')}"
    )
    spelled = " / ".join(f"`{name}{value}`" for name in names).replace("|", "\\|")
    notes = []
    default = getattr(parameter, "default", None)
    if not is_argument and parameter.secondary_opts:
        notes.append(f" Default: `{(parameter.opts if default else parameter.secondary_opts)[0]}`.")
    elif not is_argument and isinstance(default, str | int | float) and not isinstance(default, bool) and default != "":
        notes.append(f" Default: `{default}`.")
    if parameter.required:
        notes.append(" Required.")
    if earlier:
        notes.append(f" Earlier name: {', '.join(earlier)}.")
    return f"| {spelled} | {plain(getattr(parameter, 'help', ''))}{''.join(notes)} |"


def named(path: str) -> Any:
    """What a dotted path names; an error ends the build where the package does not have it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def home(thing: Any) -> str:
    """The dotted path that a function or class is defined at."""
    return f"{thing.__module__}.{thing.__qualname__}"


def api() -> str:
    """The public functions, what they return, and the records of plans, families, methods and layouts."""
    import headfold

    functions = [getattr(headfold, name) for name in headfold.__all__ if name != "__version__"]
    public = {name: getattr(headfold, name) for name in headfold.__all__ if name != "__version__"}
    parts = ["## Functions"]
    for name, function in public.items():
        heading = "" if function.__name__ == name else f"`headfold.{name}` is the following function.\n\n"
        parts.append(f"{heading}::: {home(function)}")
    results: dict[str, None] = {}
    for function in functions:
        results.update(dict.fromkeys(_records_in(function)))
    records = [home(named(path)) for path in RECORDS]
    parts += ["## Results", *(f"::: {path}" for path in results if path not in records)]
    parts += ["## Records", *(f"::: {path}" for path in records)]
    return "\n\n".join(parts)


def _records_in(function: Callable[..., Any]) -> Iterator[str]:
    """The dataclasses of this package that a function returns."""
    returned = inspect.unwrap(function).__annotations__.get("return")
    waiting = [returned]
    while waiting:
        found = waiting.pop(0)
        waiting += get_args(found)
        if inspect.isclass(found) and dataclasses.is_dataclass(found) and found.__module__.startswith("headfold"):
            yield home(found)


METHODS = {
    "--merge": "Merges",
    "--group": "Groupings",
    "--group METHOD:cost=": "Costs",
    "--route": "Routes",
    "--layout": "Export layouts",
}
"""Option of the command line → the heading over its methods."""


def methods() -> str:
    """The page of every merge, grouping, cost, route and layout, as `headfold methods NAME` prints it."""
    from headfold.verbs.methods import methods as pages

    by_option: dict[str, list[Any]] = {}
    for page in pages():
        by_option.setdefault(page.option, []).append(page)
    return "\n\n".join(
        "\n\n".join([f"## {METHODS[option]}", *map(_method, found)]) for option, found in by_option.items()
    )


def _method(page: Any) -> str:
    spelled = f"`{page.option}{'' if page.option.endswith('=') else ' '}{page.name}`"
    rows = [f"| `{key}` | `{value}` |" for key, value in page.options.items()]
    listed = "\n".join(["| option | default |", "| --- | --- |", *rows]) if rows else ""
    return "\n\n".join(part for part in (f"### {page.name}", spelled, long_text(page.page), listed) if part)


def families() -> str:
    """Every family: its model types, its sites, position on K, and what is refused."""
    from headfold.families import all_families

    lines = [
        "| family | model types | sites | position on K | class with grouped K/V heads | refused |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, family in all_families().items():
        cells = [f"`{name}`", ", ".join(family.model_types), *_family(family)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _family(family: Any) -> Iterator[str]:
    refused = "; ".join(
        f"{'always' if setting == '*' else f'with `{setting}`'}: {plain(reason)}"
        for setting, reason in family.refuses.items()
    )
    if not family.attentions:
        yield from ("", "", "", refused)
        return
    sites = [
        f"`{site.name}`{' (with `--encoder`)' if site.optional and len(family.attentions) > 1 else ''}"
        for site in family.attentions
    ]
    yield ", ".join(sites)
    orders = [site for site in family.attentions if site.alibi]
    tables = any(site.bias_table or site.stack_table for site in family.attentions)
    rope = family.position
    position = "bias on the logits" if tables else "none"
    if rope is not None:
        part = " on part of each head" if rope.fraction or rope.dim else ""
        position = f"RoPE, {'neighbouring dims' if rope.interleaved else 'halves'}{part}"
    if orders:
        position = "slope by head" if any(site.alibi == "*" for site in orders) else f"{position}, or slope by head"
    if any(site.k_norm for site in family.attentions):
        position += "; norm on K"
    yield position
    yield "yes" if all(site.kv_heads for site in family.attentions) else "no"
    yield refused


PARTS: Mapping[str, Callable[[], str]] = {"cli": cli, "api": api, "methods": methods, "families": families}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated parts where their marks are."""
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML."""

    def converted(found: re.Match[str]) -> str:
        display = "block" if found["tag"] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found["tex"]).strip(), display=display)

    return FORMULA.sub(converted, content)
