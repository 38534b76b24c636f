"""The card of a fold, read back: its summary, its table, and the sections that a route or a training added."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.cards import CARD, read_card
from ..core.errors import UserError

MOST_CHARACTERS = 500_000
"""More than the card of any fold has."""
_LEFT_OUT = ("Use", "Predicted error", "Made by")
"""Sections of a card that the page shows in another form."""

Table = Sequence[Sequence[str]]
"""Rows of cells, the header first."""


@dataclass(slots=True)
class CardSection:
    """What stands under one heading, as plain text."""

    heading: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Card:
    """The parts of a card that the page shows; all are empty where the card does not have them."""

    summary: str = ""
    table: Table = ()
    """Rows of what it says of the original and of the fold: a label and two texts."""
    items: Sequence[str] = ()
    """Lines such as "Verified: …"."""
    further: Sequence[CardSection] = ()
    """Sections on what was done after the fold."""
    command: str = ""


def card_of(directory: Path) -> Card:
    """Return what the README.md of a fold says; an empty card where there is none.

    Raises:
        UserError: it is too long to be one that headfold wrote.
    """
    text = read_card(directory)
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{directory / CARD}: expected a card of at most {MOST_CHARACTERS} characters, got {len(text)}; shorten it"
        )
    sections = list(_sections(text))
    first = sections[0] if sections else CardSection("")
    tables = [table for table in first.tables if table[0][1:] == ["original", "this"]]
    made = [block for section in sections if section.heading == "Made by" for block in section.code]
    return Card(
        summary=(first.paragraphs or [""])[0],
        table=tables[0][1:] if tables else (),
        items=first.items,
        further=[section for section in sections[1:] if section.heading not in _LEFT_OUT],
        command=made[0].strip() if made else "",
    )


def _sections(text: str) -> Iterator[CardSection]:
    """Yield the sections of a text in Markdown, from its first heading on."""
    from markdown_it import MarkdownIt

    if text.startswith("---\n"):
        text = text[4:].partition("\n---")[2]
    section: CardSection | None = None
    opened: list[str] = []
    for token in MarkdownIt("commonmark", {"html": False}).enable("table").parse(text):
        if token.nesting:
            opened = [*opened, token.type] if token.nesting == 1 else opened[:-1]
        if token.type == "heading_open":
            if section is not None:
                yield section
            section = CardSection("")
        if section is None:
            continue
        if token.type == "table_open":
            section.tables.append([])
        elif token.type == "tr_open":
            section.tables[-1].append([])
        elif token.type in ("fence", "code_block"):
            section.code.append(token.content)
        elif token.type == "inline":
            _add(section, opened, "".join(_words(child) for child in token.children or []))
    if section is not None:
        yield section


def _add(section: CardSection, opened: Sequence[str], text: str) -> None:
    if "heading_open" in opened:
        section.heading = text
    elif "tr_open" in opened:
        section.tables[-1][-1].append(text)
    elif "list_item_open" in opened:
        section.items.append(text)
    else:
        section.paragraphs.append(text)


def _words(token: object) -> str:
    """Return the text of an inline token, without its markup."""
    kind = getattr(token, "type", "")
    if kind in ("text", "code_inline"):
        return str(getattr(token, "content", ""))
    return " " if kind in ("softbreak", "hardbreak") else ""
