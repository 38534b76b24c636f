"""How headfold refuses: one line that says where, what was expected, what was found and what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A refusal addressed to the user. The command line prints its one line and exits with code 2."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean …?` with the nearest known names, else the list of all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
