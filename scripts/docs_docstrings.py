"""Keep docstrings plain in the documentation: brackets in their prose are mathematics, not links to other objects."""

import re
from typing import Any

import griffe

SPAN = re.compile(r"(`[^`]*`)|\[(?![^\]]*\]\()")


class PlainBrackets(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Escape every opening bracket outside code that begins no link."""
        if obj.docstring:
            obj.docstring.value = SPAN.sub(lambda found: found[1] or "\\[", obj.docstring.value)
