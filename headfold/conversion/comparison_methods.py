"""The methods that a comparison folds by."""

from collections.abc import Sequence
from typing import Any

from ..core.errors import UserError, suggest
from ..planning import parse_group, parse_kv_heads
from .source import Source

REFIT = "+refit"
METHODS: dict[str, dict[str, Any]] = {
    "mean": {"merge": "mean", "group": "contiguous"},
    "first": {"merge": "first", "group": "contiguous"},
    "random": {"merge": "random", "group": "contiguous"},
    "procrustes": {"merge": "procrustes", "group": "swap:cost=procrustes"},
    "procrustes+norm": {"merge": "procrustes:norm=true", "group": "swap:cost=procrustes"},
    "qcqa-ec": {"merge": "mean", "group": "qcqa"},
    "qcqa-ac": {"merge": "mean", "group": "qcqa:unequal=true"},
    "asymgqa": {"merge": "mean", "group": "asymgqa"},
    "asymgqa-unequal": {"merge": "mean", "group": "asymgqa:unequal=true"},
    "absorb": {"merge": "absorb", "group": "swap"},
    "absorb-unequal": {"merge": "absorb", "group": "swap:unequal=true"},
    "absorb-wide": {"merge": "absorb", "group": "swap", "head_dim_multiple": "2"},
}
"""The published methods and ours (`absorb+refit` is the default of fold); each may have `+refit` behind its name. `absorb-wide` keeps half
as many heads with twice the head_dim: the same cache, at the cost in weights and arithmetic that its row names."""
WITHOUT_REFIT = ("random",)
"""Methods whose heads are meant to be trained: there is nothing to refit."""
DEFAULT = tuple(name + end for name in METHODS for end in ("", REFIT) if not (end and name in WITHOUT_REFIT))


def check_methods(names: Sequence[str]) -> None:
    """Refuse names that are no methods.

    Raises:
        UserError: names the nearest ones.
    """
    for name in names:
        if name not in DEFAULT:
            raise UserError(f"compare: no method {name!r}; {suggest(name, list(DEFAULT))}")


def common_counts(source: Source, kv_heads: Sequence[str | int], methods: Sequence[str]) -> list[int]:
    """Return the counts of K/V heads that `kv_heads` means, which all of the methods can have.

    Raises:
        UserError: a count that one of them cannot have.
    """
    unequal = all(parse_group(METHODS[name.removesuffix(REFIT)]["group"]).unequal for name in methods)
    return [parse_kv_heads(requested, source.num_kv_heads, unequal=unequal) for requested in kv_heads]
