"""The commands that serve each fold, engine by engine."""

from collections.abc import Sequence

from markupsafe import Markup

from .contents import Contents, Served
from .elements import Section, code, paragraph, subheading


def section(contents: Contents) -> Section | None:
    """Return the section; None where no fold was given."""
    parts: list[Markup] = []
    for name, found in contents.served.items():
        parts.append(subheading(name))
        parts += [paragraph(found, "absent")] if isinstance(found, str) else [_engines(found)]
    return Section("Serve it", parts, {}) if parts else None


def _engines(found: Sequence[Served]) -> Markup:
    one = Markup("<div><dt>{}</dt><dd>{}{}</dd></div>")
    listed = (one.format(each.engine, code(each.install), _served(each.serve)) for each in found)
    return Markup('<dl class="engines">{}</dl>').format(Markup("\n").join(listed))


def _served(command: str) -> Markup:
    return paragraph(command, "absent") if command.startswith("not served") else code(command)
