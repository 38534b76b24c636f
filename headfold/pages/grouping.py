"""The grouping of every layer as a picture: query heads in their order, coloured by the K/V head that they share."""

from collections.abc import Sequence

from markupsafe import Markup

from ..core.groups import Groups
from .contents import Contents, Fold
from .elements import Section, folded_away, paragraph, subheading, table

CELL, GAP, LABEL, HEAD = 20, 2, 7.5, 22
"""Pixels of a cell, between cells, of a letter of a label, and above the first row."""
MOST_NUMBERED = 4000
"""Cells that have the number of their K/V head written in them; more would make the page large."""
MOST_CELLS = 200_000
_GOLDEN = 0.618033988749895


def section(contents: Contents) -> Section | None:
    """Return the section; None where no fold was given."""
    parts = [part for fold in contents.folds for part in _fold(fold)]
    return Section("Which heads share", parts, {}) if parts else None


def _fold(fold: Fold) -> Sequence[Markup]:
    rows = {name: _shared(site.groups, fold.query_heads[name]) for name, site in fold.plan.sites.items()}
    listed = [
        (name, "; ".join(f"{number}: {_ranges(heads)}" for number, heads in _members(row)))
        for name, row in rows.items()
    ]
    several = max(fold.query_heads.values())
    note = "Each cell is a query head of the original, its number above; the number in it, and its colour, say which K/V head it reads now."
    if several > 1:
        note += f" The original has one K/V head for {several} query heads, which stay together."
    picture = paragraph("There are too many heads for a picture.", "absent")
    if sum(map(len, rows.values())) <= MOST_CELLS:
        picture = _picture(fold.name, rows)
    return [
        subheading(fold.name), picture, paragraph(note, "note"),
        folded_away("As a list", table(f"Query heads of each K/V head of {fold.name}", ("site", "K/V head: query heads"), listed)),
    ]  # fmt: skip


def _shared(groups: Groups, query_heads: int) -> tuple[int, ...]:
    """Return the new K/V head of each query head, in the original's order."""
    return tuple(group for group in groups.group_of_head for _ in range(query_heads))


def _members(row: Sequence[int]) -> list[tuple[int, list[int]]]:
    found: dict[int, list[int]] = {}
    for head, group in enumerate(row):
        found.setdefault(group, []).append(head)
    return sorted(found.items())


def _ranges(heads: Sequence[int]) -> str:
    """Return ascending numbers with runs drawn together: `0-2, 5`."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][1] + 1:
            runs[-1][1] = head
        else:
            runs.append([head, head])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def colour_of(group: int) -> str:
    """Return the colour of a K/V head: light enough for dark figures, and far in hue from those of the heads before it."""
    hue = round(360 * ((0.58 + group * _GOLDEN) % 1))
    return f"hsl({hue} {(62, 45, 75)[group % 3]}% {(76, 68, 84)[group // 3 % 3]}%)"


def _picture(name: str, rows: dict[str, tuple[int, ...]]) -> Markup:
    """Return the picture. The cells of one K/V head in a row are one path, so that the page stays small."""
    left = round(LABEL * max(map(len, rows))) + 12
    most = max(map(len, rows.values()))
    step = CELL + GAP
    width, height = left + most * step, HEAD + len(rows) * step
    numbered = sum(map(len, rows.values())) <= MOST_NUMBERED
    heads = [_figure(left + head * step + CELL / 2, 15, head) for head in range(most) if numbered or head % 8 == 0]
    drawn = [_row(site, row, left, HEAD + number * step, numbered) for number, (site, row) in enumerate(rows.items())]
    return Markup(
        '<div class="box" role="region" tabindex="0" aria-label="Grouping of {}"><svg class="heads" role="img" '
        'aria-label="Which K/V head each query head of {} reads" width="{}" height="{}" viewBox="0 0 {} {}">'
        '<g class="label">{}</g>{}</svg></div>'
    ).format(name, name, width, height, width, height, Markup("").join(heads), Markup("\n").join(drawn))


def _figure(x: float, y: float, number: int) -> Markup:
    return Markup('<text x="{:g}" y="{:g}">{}</text>').format(x, y, number)


def _row(site: str, row: Sequence[int], left: int, top: int, numbered: bool) -> Markup:
    step = CELL + GAP
    paths = [
        Markup('<path fill="{}" d="{}"><title>{}: query heads {} read K/V head {}</title></path>').format(
            colour_of(group),
            "".join(f"M{left + head * step} {top}h{CELL}v{CELL}h-{CELL}z" for head in heads),
            site, _ranges(heads), group,
        )
        for group, heads in _members(row)
    ]  # fmt: skip
    figures = [_figure(left + head * step + CELL / 2, top + 14, group) for head, group in enumerate(row) if numbered]
    label = Markup('<text class="site" x="{}" y="{}">{}</text>').format(left - 8, top + 14, site)
    return Markup("<g>{}{}{}</g>").format(label, Markup("").join(paths), Markup("").join(figures))
