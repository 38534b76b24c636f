"""Gram matrices of the K and V heads of one site, weighted by the queries and outputs that read them.

Grouping, alignment, merging and prediction all use these, so they are computed once per site, in float64.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Complex, Float
from torch import Tensor

from .heads import Heads
from .norms import without_norms
from .shared import NEGLIGIBLE, used
from .stats import SiteStats


@dataclass(frozen=True, slots=True)
class WeightedGram:
    """Gram matrix of all K/V heads without position, weighted by their readers' metric M (docs/absorb.md, 2): W̃ = M^½ W.

    `gram[i, a, l, b]` = E[(W̃_i x)_a (W̃_l x)_b]. Its trace is the energy that the readers see. `root` is M^½ and `inverse_root`
    its pseudo-inverse.
    """

    gram: Float[Tensor, "group dim group dim"]
    root: Float[Tensor, "group dim dim"]
    inverse_root: Float[Tensor, "group dim dim"]


@dataclass(frozen=True, slots=True)
class Planes:
    """The rotary part of all K heads, one complex functional per head and frequency plane (docs/absorb.md, 3).

    `gram[f, i, l]` = E[z_i z̄_l] for z = k_a + j·k_b (unweighted). `energy[f, i]` = E|q|²
    summed over the queries that read K head i.
    """

    gram: Complex[Tensor, "plane group group"]
    energy: Float[Tensor, "plane group"]

    @property
    def weighted(self) -> Complex[Tensor, "plane group group"]:
        """The Gram matrix of √energy · z. Its largest eigenvalue is the energy that one shared functional can keep."""
        root = self.energy.sqrt().to(self.gram.dtype)
        return root[:, :, None] * self.gram * root[:, None, :]


@dataclass(frozen=True, slots=True)
class WholeKeys:
    """Moments of all dims of K and of the queries that read them, without weights."""

    queries: Float[Tensor, "group dim dim"]
    """Σ E[q qᵀ] over the queries of each K head."""
    second: Float[Tensor, "group dim group dim"]
    """E[k kᵀ] of all K heads."""
    scatter: Float[Tensor, "group dim group dim"]
    """The Gram matrix around the mean of each sequence."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Gram matrices of one site: the rotary planes of K (None without RoPE), the other dims of K (None if all rotate), and V."""

    planes: Planes | None
    keys: WeightedGram | None
    values: WeightedGram
    value_mean: Float[Tensor, "group dim"] | None
    """E[v], where the site has an output bias that can absorb it."""
    whole_keys: WholeKeys | None = None
    """Only if `site_moments` is called with `whole_keys`."""


def site_moments(
    heads: Heads,
    stats: SiteStats,
    *,
    query_weighting: bool = True,
    output_weighting: bool = True,
    products: torch.dtype = torch.float64,
    whole_keys: bool = False,
) -> Moments:
    """Compute all Gram matrices of a site, in float64. `heads` may be of any float dtype.

    Norms of queries and keys are held at their root mean square. Without `query_weighting` or `output_weighting` (for ablations),
    K or V is measured in its own units. `products` is the dtype of the long sums over the site's inputs: float32 takes half the
    time and suffices for predictions; a merge divides by small eigenvalues and needs float64, so it cannot take over those of a
    plan. `whole_keys` computes `Moments.whole_keys`, which only sites with RoPE have.
    """
    heads, second = without_norms(heads.to(products), stats), stats.mean("second").to(products)
    query_inputs = stats.mean("query_second").to(products) if "query_second" in stats.tensors else second
    readers = query_moments(heads, query_inputs) if query_weighting else _identities(heads.num_kv_heads, heads.head_dim)
    rotary = heads.key_freedom.rotary_dim
    # Without `whole_keys` the dims that do not rotate need not be multiplied with those that do.
    gram = _gram(heads.k if whole_keys else heads.k[:, :rotary], second) if rotary else None
    planes = None if gram is None else _planes(heads, gram[:, :rotary, :, :rotary], readers)
    flat = None
    moment = torch.zeros_like(second)
    if rotary < heads.head_dim or whole_keys:
        # A key component that is constant over a sequence shifts all its logits by the same amount: softmax ignores it.
        moment[:-1, :-1] = stats.mean("scatter").to(products)
    if rotary < heads.head_dim:
        flat = _weighted(heads.k[:, rotary:], readers[:, rotary:, rotary:], moment)
    whole = WholeKeys(readers, gram, _gram(heads.k, moment)) if whole_keys and gram is not None else None
    metric = output_metric(heads) if output_weighting else _identities(heads.num_kv_heads, heads.v.shape[1])
    mean = None
    if heads.o_bias is not None:
        # Attention weights sum to one, so E[v] passes through unchanged: the output bias takes it, exactly.
        mean = (heads.v @ second[:, -1]).double()
        second = second - torch.outer(second[:, -1], second[:, -1])
    values = _weighted(heads.v, metric, second)
    return Moments(planes, flat, values, mean, whole)


def _identities(num_kv_heads: int, dim: int) -> Float[Tensor, "group dim dim"]:
    return torch.eye(dim, dtype=torch.float64).expand(num_kv_heads, dim, dim)


def query_moments(heads: Heads, second: Float[Tensor, "m m"]) -> Float[Tensor, "group dim dim"]:
    """Return Σ E[q qᵀ] over the query heads of each K/V head."""
    moments = einsum(heads.q @ second, heads.q, "head a model, head b model -> head a b").double()
    return _sum_over_queries(heads, moments)


def output_metric(heads: Heads) -> Float[Tensor, "group dim dim"]:
    """Return Σ W_oᵀ W_o over the query heads of each K/V head: how much a change of v changes the output."""
    return _sum_over_queries(heads, einsum(heads.o, heads.o, "head a model, head b model -> head a b").double())


def _sum_over_queries(heads: Heads, per_query: Tensor) -> Tensor:
    total = per_query.new_zeros(heads.num_kv_heads, *per_query.shape[1:])
    return total.index_add(0, torch.tensor(heads.groups.group_of_head), per_query)


def _planes(heads: Heads, gram: Float[Tensor, "group rotary group rotary"], readers: Tensor) -> Planes:
    first, other = heads.key_freedom.planes().T
    gram = rearrange(gram, "i a l b -> a b i l")
    real, imaginary = gram[first, first] + gram[other, other], gram[other, first] - gram[first, other]
    diagonal = torch.diagonal(readers, dim1=1, dim2=2)
    energy = (diagonal[:, first] + diagonal[:, other]).T
    return Planes(torch.complex(real, imaginary), used(energy))


def _gram(rows: Float[Tensor, "group dim m"], moment: Float[Tensor, "m m"]) -> Float[Tensor, "group dim group dim"]:
    return einsum(rows @ moment, rows, "i a model, l b model -> i a l b").double()


def _weighted(rows: Tensor, metric: Tensor, moment: Tensor) -> WeightedGram:
    root, inverse = roots(metric)
    rows = root.to(rows.dtype) @ rows
    return WeightedGram(_gram(rows, moment), root, inverse)


def roots(
    metric: Float[Tensor, "group dim dim"],
) -> tuple[Float[Tensor, "group dim dim"], Float[Tensor, "group dim dim"]]:
    """Return the symmetric square root and its pseudo-inverse; unused directions are mapped to zero by both."""
    values, vectors = torch.linalg.eigh(metric)
    kept = values > NEGLIGIBLE * values.amax(1, keepdim=True)
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, 1 / root, 0)
    return (vectors * root[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT
