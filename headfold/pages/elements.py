"""The elements that sections are made of. Whatever comes in as a text is escaped; only `Markup` is taken for HTML."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

Charts = Mapping[str, Mapping[str, Any]]
"""Vega-Lite specifications by the id of the figure that they are drawn in."""
MOST_ROWS = 1000
"""Of a table; what a page has more of is in its file."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page: its heading, the parts in order, and the charts that are drawn in them."""

    heading: str
    parts: Sequence[Markup]
    charts: Charts

    @property
    def anchor(self) -> str:
        """The id that links lead to."""
        return slug(self.heading)


def slug(text: str) -> str:
    """Return a text as an id of HTML: lower case letters and digits, and hyphens for all others."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def joined(parts: Iterable[Markup]) -> Markup:
    """Return parts one after the other."""
    return Markup("\n").join(parts)


def paragraph(text: str, kind: str = "") -> Markup:
    """Return a paragraph; `kind` is a class of the stylesheet."""
    return Markup('<p class="{}">{}</p>').format(kind, text) if kind else Markup("<p>{}</p>").format(text)


def not_measured(what: str, command: str) -> Markup:
    """Return the line that stands where something was not measured: what, and the command that measures it."""
    return Markup('<p class="absent">{} <code>{}</code></p>').format(what, command)


def subheading(text: str) -> Markup:
    """Return a heading inside a section."""
    return Markup("<h3>{}</h3>").format(text)


def code(text: str) -> Markup:
    """Return a block of code."""
    return Markup('<pre tabindex="0"><code>{}</code></pre>').format(text)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Return a table in a box of its own that scrolls; the first cell of each row is its heading."""
    shown = rows[:MOST_ROWS]
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(cell) for cell in header)
    body = Markup("\n").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        )
        for row in shown
    )
    more = paragraph(f"The first {MOST_ROWS:,} of {len(rows):,} rows.", "note") if len(rows) > MOST_ROWS else Markup("")
    return Markup(
        '<p class="caption">{}</p><div class="box" role="region" tabindex="0" aria-label="{}"><table aria-label="{}">'
        "<thead><tr>{}</tr></thead><tbody>\n{}\n</tbody></table></div>{}"
    ).format(caption, caption, caption, head, body, more)


def folded_away(summary: str, content: Markup) -> Markup:
    """Return content that is shown when its summary is opened."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, content)


def chart(anchor: str, caption: str, figures: Markup) -> Markup:
    """Return the figure in which a chart is drawn, with its numbers as a table."""
    return Markup(
        '<figure><figcaption>{}</figcaption><div class="chart" id="{}" role="img" aria-label="{}"></div>{}</figure>'
    ).format(caption, anchor, caption, folded_away("Numbers", figures))


def tiles(items: Sequence[tuple[str, str, str]]) -> Markup:
    """Return a row of tiles, each a label with what was and what is."""
    one = Markup('<div class="tile"><dt>{}</dt><dd><span class="was">{}</span> <span class="is">{}</span></dd></div>')
    return Markup('<dl class="tiles">{}</dl>').format(
        joined(one.format(label, f"{was} →" if was else "", now) for label, was, now in items)
    )


def as_script(value: Any) -> Markup:
    """Return JSON that can stand in a script element: no character of it ends the element, and NaN and infinity are null."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """Return a value with None for every number in it that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
