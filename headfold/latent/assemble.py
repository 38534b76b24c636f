"""Assemble the weights of an MLA site from the fit of its moments."""

import torch

from ..core.heads import Heads
from .fit import Fit
from .moments import SiteMoments
from .site import Latent


def assembled(heads: Heads, moments: SiteMoments, found: Fit, rotary_dim: int) -> Latent:
    """Return the site in float64. Its queries are those of the source, followed by those of the rotary key, scaled so that the softmax
    scale 1 / √(dims of a query) gives the logits of the source.
    """
    heads = heads.to(torch.float64)
    q = heads.q[:, heads.key_freedom.planes().flatten(), :-1]
    nope = q.shape[1]
    turned = found.keys[:, :, :rotary_dim].mT @ q
    scale = ((nope + rotary_dim) / nope) ** 0.5
    shared = found.mix @ moments.rows
    return Latent(
        q=torch.cat([q, turned], 1) * scale,
        down=shared[rotary_dim:],
        rotary=shared[:rotary_dim],
        up_k=found.keys[:, :, rotary_dim:],
        up_v=found.values,
        o=heads.o,
    )
