"""Refits the projections of every block to the original: its attention, then its output.

First W_q, by the cross-entropy to the original's attention weights (`queries.py`). With attention fixed, W_o, then W_v for the attended
values, then W_o again, by least squares, each step decreasing the same Σ ‖y − ŷ‖² over the calibration tokens with all other weights
fixed (`ridge.py`, `values.py`). Then W_q, W_k and W_v together, by gradient, in one pass over the data (`heal.py`), and W_o once more. In
y the errors of merged heads add up, which a merge of one group at a time does not see.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..calibration import Sample, batches, num_tokens
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..core.query_sample import QUERY_STEPS
from ..descent.descend import NotFinite, schedule, total_tokens
from ..families.spec import Site
from ..parallel import on_main
from .fitting import Solver, fit
from .heal import trained
from .queries import has_data, refit_queries
from .recorded import RecordedSite
from .ridge import refit_output
from .values import curvature_batches, refit_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-2
"""λ relative to the mean energy of the fitted inputs; for W_q and W_v, to the curvature."""
VALUE_STEPS = 3
"""Conjugate gradient steps for W_v. The first few bring most of the gain, and more of them little."""
DESCENT_PASSES = 1
"""Passes over the data of the descent at the end. It sees every datum once, so that it cannot learn the data by heart."""
DESCENT_CHECKS = 1
LONGER = 1.0
"""Length of its steps in lengths of the first, which is the best along the mean of several gradients: there are few of them."""
PARTS = 8
"""Steps of the descent for each batch of calibration, as far as it has items: many that see little are better than few that see much."""
MOST_POSITIONS = 256
"""Positions of images or sound, per input dim, that a fit sees: no fewer if there are more, and less than twice as many."""


def tokens_per_block(sample: Sample, value_steps: int = VALUE_STEPS, passes: int = DESCENT_PASSES) -> int:
    """Return the number of tokens, or items, that a refit runs through every block."""
    lengths = [num_tokens(batch) for batch in batches(sample)]
    descended = total_tokens(lengths, passes * sum(lengths), DESCENT_CHECKS) if passes else 0
    if value_steps == 0:
        return sum(lengths) + descended
    return (
        3 * sum(lengths) + descended + value_steps * sum(lengths[number] for number in curvature_batches(len(lengths)))
    )


def refit(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Heads],
    sample: Sample,
    *,
    ridge: float = RIDGE,
    value_steps: int = VALUE_STEPS,
    query_steps: int = QUERY_STEPS,
    passes: int = DESCENT_PASSES,
    **how: Any,
) -> dict[str, FittedHeads]:
    """Return the fitted heads of every site: `o`, `o_bias` where there is one, and `v`; complete heads where W_q is fitted; float32.

    `value_steps=0` leaves W_v out of least squares, `query_steps=0` W_q, and `passes=0` the descent. `model`, `sites`, `merged` and
    `how` are those of `fitting.fit`.
    """
    thins = partial(_sees_frames, sample)
    solve = partial(_fitted, ridge=ridge, value_steps=value_steps, query_steps=query_steps, passes=passes, thins=thins)
    solver = Solver(
        solve,
        tokens_per_block(sample, value_steps, passes),
        fixes_attention=True,
        most=lambda site: MOST_POSITIONS if thins(site) else None,
    )
    return fit(model, sites, merged, list(batches(sample)), solver, **how)


def _sees_frames(sample: Sample, site: Site) -> bool:
    """Return whether the queries of a site are frames or patches, many and alike, and not text, of which the user names the amount."""
    labels = sample.get("labels")
    writes = labels is not None and labels.ndim == 2 and site.stack == "decoder"
    return "input_ids" not in sample and not writes


def _fitted(
    site_calls: RecordedSite,
    heads: Heads,
    ridge: float,
    value_steps: int,
    query_steps: int,
    passes: int,
    thins: Callable[[Site], bool],
) -> FittedHeads:
    if thins(site_calls.site):
        site_calls.thin(MOST_POSITIONS * (heads.q.shape[2] - 1), heads.q.device)
    fits_queries = query_steps and has_data(site_calls, heads)
    attending = refit_queries(site_calls, heads, ridge, query_steps) if fits_queries else None
    is_complete = attending is not None
    if attending is not None:
        heads = _if_finite(attending, heads)
    heads = _if_finite(refit_output(site_calls, heads, ridge), heads)
    if value_steps:
        fitted = _if_finite(refit_values(site_calls, heads, ridge, value_steps), heads)
        heads = _if_finite(refit_output(site_calls, fitted, ridge), fitted)
    if passes and has_data(site_calls, heads):
        fitted, is_complete = _descended(site_calls, heads, passes), True
        heads = _if_finite(refit_output(site_calls, fitted, ridge), fitted)
    if is_complete:
        return FittedHeads.of(heads)
    return FittedHeads(o=heads.o, o_bias=heads.o_bias, v=heads.v if value_steps else None)


def _descended(site_calls: RecordedSite, heads: Heads, passes: int) -> Heads:
    """Return the heads with another `q`, `k` and `v`, in no case worse on held-back calls."""
    site_calls.free_attention()
    site_calls.split(PARTS, heads)
    # Texts come longest first: the calls that are held back should be of all lengths.
    calls, generator = site_calls.all_numbers, torch.Generator().manual_seed(0)
    site_calls.all_numbers = [calls[at] for at in torch.randperm(len(calls), generator=generator).tolist()]
    counts = [1] * len(site_calls.all_numbers)
    plan = schedule(counts, passes * len(counts), num_checks=DESCENT_CHECKS, longer=LONGER, seed=0)
    with suppress(NotFinite):
        return trained(site_calls, heads, plan, fields=("q", "k", "v"), whitens=True).onto(heads)
    return heads


def _if_finite(fitted: Heads, before: Heads) -> Heads:
    """Return fitted heads, or those before where a product overflowed, as of weights near the ends of float32."""
    whole = all(bool(tensor.isfinite().all()) for tensor in (fitted.q, fitted.k, fitted.v, fitted.o))
    return fitted if on_main(lambda: whole) else before
