"""Refits W_o and the shared W_v of every block to the original's output, by least squares.

W_o, then W_v for the attended values, then W_o again, each step decreasing the same Σ ‖y − ŷ‖² over the calibration tokens with
all other weights fixed (`ridge.py`, `values.py`). In y the errors of merged heads add up, which a merge of one group at a time
does not see.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..calibration import Sample, batches, total_tokens
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..families.spec import Site
from .fitting import Solver, fit
from .recorded import RecordedSite
from .ridge import refit_output
from .values import refit_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-2
"""λ relative to the mean energy of the fitted inputs."""
VALUE_STEPS = 3
"""Conjugate gradient steps for W_v. The first few bring most of the gain, and more of them little."""


def num_passes(value_steps: int = VALUE_STEPS) -> int:
    """Return how often a refit runs every block over the whole data."""
    return 1 if value_steps == 0 else value_steps + 3


def refit(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Heads],
    sample: Sample,
    *,
    ridge: float = RIDGE,
    value_steps: int = VALUE_STEPS,
    **how: Any,
) -> dict[str, FittedHeads]:
    """Return the fitted heads of every site: `o`, `o_bias` where there is one, and `v`; float32.

    `value_steps=0` fits W_o only. `model`, `sites`, `merged` and `how` are those of `fitting.fit`.
    """
    solver = Solver(
        partial(_fitted, ridge=ridge, value_steps=value_steps), total_tokens(sample) * num_passes(value_steps)
    )
    return fit(model, sites, merged, list(batches(sample)), solver, **how)


def _fitted(site_calls: RecordedSite, heads: Heads, ridge: float, value_steps: int) -> FittedHeads:
    heads = refit_output(site_calls, heads, ridge)
    if value_steps:
        heads = refit_output(site_calls, refit_values(site_calls, heads, ridge, value_steps), ridge)
    return FittedHeads(o=heads.o, o_bias=heads.o_bias, v=heads.v if value_steps else None)
