"""What was folded and how: the facts of each fold's card."""

import re
from collections.abc import Sequence

from markupsafe import Markup

from ..reports.tables import count_range
from .cards import CardSection
from .contents import Contents, Fold
from .elements import Section, code, folded_away, joined, paragraph, subheading, table, tiles

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
"""Of which the beginning tells enough."""

LABELS = ("K/V cache per token", "attention weights")
NOT_CACHED = {LABELS[0]: "K and V per token, not cached"}


def section(contents: Contents) -> Section | None:
    """Return the section; None where no fold was given."""
    parts = [part for fold in contents.folds for part in _fold(fold)]
    beside = [_side_by_side(contents.folds)] if len(contents.folds) > 1 else []
    return Section("What was folded", [*beside, *parts], {}) if parts else None


def _side_by_side(folds: Sequence[Fold]) -> Markup:
    rows = [
        (
            fold.name,
            fold.base_model,
            " → ".join(kv_heads(fold)),
            *(" → ".join(row_of(fold, label) or row_of(fold, NOT_CACHED.get(label, ""))) for label in LABELS),
            fold.plan.group,
            merges(fold),
        )
        for fold in folds
    ]
    return table(
        "Side by side", ("fold", "original", "K/V heads", "K/V per token", LABELS[1], "grouped by", "merged by"), rows
    )


def row_of(fold: Fold, label: str) -> Sequence[str]:
    """Return what the card says before and after of a cost; nothing where it has no such row."""
    return next((row[1:] for row in fold.card.table if len(row) == 3 and row[0] == label), ())


def merges(fold: Fold) -> str:
    """Return the merges of a fold with their options."""
    return ", ".join(dict.fromkeys(site.merge for site in fold.plan.sites.values()))


def kv_heads(fold: Fold) -> tuple[str, str]:
    """Return the K/V heads of a site before and after, each a number or a range."""
    before = [site.groups.num_heads for site in fold.plan.sites.values()]
    after = list(fold.plan.num_kv_heads.values())
    return count_range(min(before), max(before)), count_range(min(after), max(after))


def _fold(fold: Fold) -> Sequence[Markup]:
    card, plan = fold.card, fold.plan
    facts = [
        ("Original", fold.base_model or "not recorded: the card is gone"),
        ("Grouped by", plan.group),
        ("Merged by", merges(fold)),
        ("Sites", str(len(plan.sites))),
        *(_halves(item) for item in card.items),
        *([] if any(item.startswith("Calibration") for item in card.items) else [_calibration(fold)]),
        ("Original's fingerprint", plan.source[:16]),
    ]
    return [
        subheading(fold.name),
        *([paragraph(card.summary)] if card.summary else []),
        tiles(_tiles(fold)),
        table(f"How {fold.name} was made", ("", "this fold"), facts),
        *(part for each in card.further for part in _further(each)),
        *([folded_away("The command that makes it again", code(card.command))] if card.command else []),
    ]


def _tiles(fold: Fold) -> list[tuple[str, str, str]]:
    """Return what a reader wants to know first."""
    before, after = kv_heads(fold)
    found = [("K/V heads per site", before, after)]
    rows = [row for row in fold.card.table if len(row) == 3]
    wanted = ("K/V cache", "K and V per token", "attention weights")
    return found + [(row[0], row[1], row[2]) for row in rows if row[0].startswith(wanted)]


def _halves(item: str) -> tuple[str, str]:
    """Return the label and the text of a line of the card."""
    label, colon, text = _DIGEST.sub(r"\1…", item).partition(":")
    return (label, text.strip()) if colon else ("", item)


def _calibration(fold: Fold) -> tuple[str, str]:
    facts = ", ".join(f"{name} {value}" for name, value in fold.plan.calibration.items() if name != "model")
    return "Calibration", _DIGEST.sub(r"\1…", facts) or "none: the plan was made without statistics"


def _further(found: CardSection) -> Sequence[Markup]:
    """Return what the card says of a step after the fold, a route or a training."""
    parts = [paragraph(text) for text in found.paragraphs]
    parts += [table(f"{found.heading}, from the card", rows[0], rows[1:]) for rows in found.tables if rows]
    parts += [paragraph(item) for item in found.items]
    parts += [code(block) for block in found.code]
    return [folded_away(found.heading, joined(parts))] if parts else []
