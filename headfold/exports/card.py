"""The model card of an export: that of the fold, with a section on how to open the layout."""

import re
from pathlib import Path

from ..checkpoint.cards import REST, UNTOUCHED, read_card, write_card
from ..checkpoint.staging import copy_file
from .misread import misread_by
from .pieces import Export


def exported_card(card: str, made: Export | None) -> str:
    """Return `card` with another section on use; the other sections, on what was folded and how, hold for every layout. Without an
    export it is the fold's own.
    """
    if made is None:
        return card
    misread = misread_by(made.config)
    warning = f"\n\nNot every reader: {misread}." if misread else ""
    return card_with_use(card, f"{made.description}.\n\n```python\n{_lines(made)}\n```{warning}", made.unchanged)


def card_with_use(card: str, use: str, unchanged: str) -> str:
    """Return `card` with `use` as its section on that, and `unchanged` in the place of what it says of tensors outside attention; if
    that is `UNTOUCHED`, what it says holds for the export too.
    """
    if unchanged != UNTOUCHED:
        card = REST.sub(lambda _: unchanged, card)
    without = re.sub(r"^## Use\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    before, heading, after = without.partition("\n## ")
    return f"{before.rstrip()}\n\n## Use\n\n{use}\n\n{heading.strip()}{' ' if heading else ''}{after}"


def copy_plan_and_card(source: Path, target: Path, use: str, unchanged: str) -> None:
    """Write the plan and the card of a fold into a directory in the format of an engine; `use` and `unchanged` as in `card_with_use`."""
    if (source / "plan.json").is_file():
        copy_file(source / "plan.json", target / "plan.json")
    if card := read_card(source):
        write_card(target, card_with_use(card, use, unchanged))


def _lines(made: Export) -> str:
    remote = ", trust_remote_code=True" if made.files else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this"{remote})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this")'
    )
