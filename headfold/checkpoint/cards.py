"""The card of a model, README.md: anyone may have written it."""

import re
from pathlib import Path

CARD = "README.md"
_REST = "all tensors outside attention are the original's"
UNTOUCHED = f"{_REST}, byte for byte"
"""What the card of a fold says of the rest of the model."""
AS_READ = f"{_REST} as it was read (see below)"
"""The same of a model that was decoded, or into which an adapter was merged, before it was folded."""
REST = re.compile("|".join(map(re.escape, (UNTOUCHED, AS_READ))))
"""Either of both."""


def read_card(directory: Path) -> str:
    """Return the model card of a checkpoint, bytes that are not UTF-8 replaced; empty where there is none."""
    card = directory / CARD
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def write_card(directory: Path, card: str) -> None:
    """Write the model card of a checkpoint; what is quoted in it of others may have half surrogate pairs, which become `?`."""
    (directory / CARD).write_text(card, encoding="utf-8", errors="replace")
