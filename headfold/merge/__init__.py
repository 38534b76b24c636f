"""Floor 4: how the heads of a group become one K/V head. One page per method: `merge(heads, groups, stats, *, seed, …)`."""

import sys

from ..core.methods import MergeMethod
from ..core.plugins import Method, parse


def parse_merge(text: str) -> Method[MergeMethod]:
    """Return the merge that `NAME[:option=value,…]` names.

    Raises:
        UserError: unknown merge or option.
    """
    return parse(sys.modules[__name__], text, MergeMethod)
