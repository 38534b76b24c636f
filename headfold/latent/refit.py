"""Fit an MLA site to the attention of the original, then to its output, by the same fits as grouped heads (`headfold.refine`)."""

import torch

from ..core.heads import Heads
from ..core.query_sample import QUERY_STEPS
from ..refine.queries import has_data, refit_queries
from ..refine.refit import RIDGE, VALUE_STEPS
from ..refine.ridge import refit_output
from ..refine.values import refit_values
from .recorded import RecordedLatent, as_heads, with_heads
from .site import Latent


def refitted(calls: RecordedLatent, site: Latent) -> Latent:
    """Return the site, in its dtype, with W_q fitted by the cross-entropy to the original's attention where there are data enough, then
    W_o, the values' half of the up-projection, and W_o again by least squares on the original's output.
    """
    heads = as_heads(site)
    if has_data(calls, heads):
        heads = _finite(refit_queries(calls, heads, RIDGE, QUERY_STEPS), heads)
    with torch.no_grad():
        heads = _finite(refit_output(calls, heads, RIDGE), heads)
    heads = _finite(refit_values(calls, heads, RIDGE, VALUE_STEPS), heads)
    with torch.no_grad():
        heads = _finite(refit_output(calls, heads, RIDGE), heads)
    return with_heads(site, heads)


def _finite(fitted: Heads | None, before: Heads) -> Heads:
    """Return fitted heads, or those before where there are none, or where a product overflowed."""
    if fitted is None:
        return before
    return fitted if all(bool(t.isfinite().all()) for t in (fitted.q, fitted.v, fitted.o)) else before
