"""The model card of an export: that of the fold, with a section on how to open the layout."""

import re

from .misread import misread_by
from .pieces import UNTOUCHED, Export


def exported_card(card: str, made: Export) -> str:
    """Return `card` with another section on use; the other sections, on what was folded and how, hold for every layout."""
    misread = misread_by(made.config)
    warning = f"Not every reader: {misread}.\n\n" if misread else ""
    section = f"## Use\n\n{made.description}.\n\n```python\n{_lines(made)}\n```\n\n{warning}"
    card = card.replace(UNTOUCHED, made.unchanged)
    without = re.sub(r"^## Use\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    before, heading, after = without.partition("\n## ")
    return f"{before.rstrip()}\n\n{section}{heading.strip()}{' ' if heading else ''}{after}"


def _lines(made: Export) -> str:
    remote = ", trust_remote_code=True" if made.files else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this"{remote})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this")'
    )
