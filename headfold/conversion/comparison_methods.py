"""The methods that a comparison folds by."""

from typing import Any

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
