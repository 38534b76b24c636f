"""Errors addressed to users: one line that says where, what was expected, what was found and what to do."""

import difflib
from collections.abc import Iterable, Sequence

_LISTED = 30
"""Names that a line lists at most."""


class UserError(ValueError):
    """An error that the user can mend. The command line prints it as one line and exits with code 2."""


class SourceError(UserError):
    """An error of the original itself, with which the same job never succeeds: nothing is kept to go on from."""


class AlreadyFinished(UserError):
    """Nothing is left to do: an earlier run of the same job was killed after its output was whole. The command line exits with code 0."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean …?` with the nearest known names, or a list of them if none is near, of all if they are not too many."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose one of {listed(names, _LISTED)}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, with the number of the others: `a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
