"""Second moments of one site as the fit of its latent needs them: all rows of K and V together, queries and outputs by query head."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distances import Distances
from ..core.heads import Heads
from ..core.stats import SiteStats

KEY_WEIGHT = 0.2
"""Weight of the keys' error beside what section 2 of docs/mla.md derives for errors that are independent between tokens: those of
values are not, and add up more."""


@dataclass(frozen=True, slots=True)
class SiteMoments:
    """What the fit of one site knows of its inputs, in float64. The rows are those of all K heads, then those of all V heads."""

    rows: Float[Tensor, "row model"]
    gram: Float[Tensor, "row row"]
    """E[y yᵀ] of the rows' outputs; a part of K that is constant over a sequence counts by what the distances turn of it."""
    kv_of_query: Int[Tensor, " head"]
    queries: Float[Tensor, "head dim dim"]
    """E[q qᵀ] times what a squared error of the logits costs in squared output, by query head."""
    outputs: Float[Tensor, "head value_dim value_dim"]
    """W_o W_oᵀ by query head: what a change of its values costs."""
    distances: Distances
    """By query head."""
    frequencies: Float[Tensor, " plane"]
    """Radians per token of the planes of K; the rows of a K head are in the order (2f, 2f + 1)."""

    @property
    def dim(self) -> int:
        """The dims of a K head."""
        return self.queries.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return int(self.kv_of_query.max()) + 1


def site_moments(heads: Heads, stats: SiteStats, key_weight: float = KEY_WEIGHT) -> SiteMoments:
    """Return the moments of a site whose keys rotate in all dims and that has no biases, from the statistics that `absorb` takes.

    An error e of a logit moves the output of a query by p (1 − p) W_o (v − v̄) e, and an error of a value by p W_o e, so with
    errors that are independent between tokens both count by Σ p², and the first by E‖W_o (v − v̄)‖² of its head (docs/mla.md, 2).
    """
    heads = heads.to(torch.float64)
    planes = heads.key_freedom.planes().flatten()
    q, k = (t[:, planes, :-1] for t in (heads.q, heads.k))
    v, o = heads.v[..., :-1], heads.o
    second = stats.mean("second")[:-1, :-1]
    scatter = stats.mean("scatter")
    reads = torch.tensor(heads.groups.group_of_head)
    outputs = o @ o.mT
    moved = torch.einsum("hab,hbm,mn,han->h", outputs, v[reads], scatter, v[reads])
    queries = torch.einsum("ham,mn,hbn->hab", q, second, q) * (key_weight * moved / q.shape[1])[:, None, None]
    freedom = heads.key_freedom
    seen = stats.tensors.get("attended")
    distances = (
        Distances.assumed(len(k), freedom.context) if seen is None else Distances.measured(seen, freedom.context)
    )
    frequencies = torch.tensor(freedom.frequencies, dtype=torch.float64)
    # One factor for all heads: with one for each, heads that are multiples of each other would no longer be.
    turned = (1 - distances.average(frequencies).abs().square()).clamp_min(0).sqrt().amax(0).repeat_interleave(2)
    rows = torch.cat([k.flatten(0, 1), v.flatten(0, 1)])
    within, full = rows @ scatter @ rows.T, rows @ second @ rows.T
    counts = torch.cat([turned.repeat(len(k)), torch.ones(v.shape[0] * v.shape[1], dtype=torch.float64)])
    gram = within + counts[:, None] * (full - within) * counts
    return SiteMoments(rows, gram, reads, queries, outputs, distances.of(reads.tolist()), frequencies)
