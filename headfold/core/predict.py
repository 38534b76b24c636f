"""Errors predicted for shared heads before anything is folded: K in logit² and V in output², kept apart."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .groups import Groups
from .moments import Moments, Planes, WeightedGram

BATCH = 2**24
"""Number of elements of the Gram matrices that are decomposed at once."""
DIRECT = 1024
"""Size of a Gram matrix up to which all its eigenvalues are computed directly."""
FEW = 16
"""Larger matrices are decomposed iteratively if at most one in so many eigenvalues is needed; at a sixteenth both ways take as
long."""


@dataclass(frozen=True, slots=True)
class SiteError:
    """Mean squared error per token, summed over the query heads: `key` in logit² (before the softmax scale), `value` in output²."""

    key: float
    value: float

    def __add__(self, other: "SiteError") -> "SiteError":
        return SiteError(self.key + other.key, self.value + other.value)


def site_energy(moments: Moments) -> SiteError:
    """Return the error of dropping K, or V, altogether: the scale for relative errors."""
    key = 0.0
    if moments.planes is not None:
        key += 0.5 * float(torch.diagonal(moments.planes.weighted, dim1=1, dim2=2).real.sum())
    if moments.keys is not None:
        key += float(torch.einsum("iaia->", moments.keys.gram))
    return SiteError(max(key, _tiny()), max(float(torch.einsum("iaia->", moments.values.gram)), _tiny()))


def predicted_error(
    moments: Moments, members: list[int], *, values: bool = True, head_dim_multiple: int = 1
) -> SiteError:
    """Return the error of the best head that `members` can share (docs/absorb.md); V counts 0 with `values=False`.

    The shared head has `head_dim_multiple` times the source's head_dim: that many functionals per plane, and that many times the
    dims.
    """
    keys, of_values = predicted_errors(
        moments, torch.tensor([members]), values=values, head_dim_multiple=head_dim_multiple
    )
    return SiteError(float(keys), float(of_values))


def predicted_errors(
    moments: Moments, sets: Int[Tensor, "set member"], *, values: bool = True, head_dim_multiple: int = 1
) -> tuple[Float[Tensor, " set"], Float[Tensor, " set"]]:
    """Return the errors of K and of V for many sets of one size at once (`predicted_error`)."""
    nothing = torch.zeros(len(sets), dtype=torch.float64)
    if sets.shape[1] <= head_dim_multiple:
        return nothing, nothing
    keys = nothing
    if moments.planes is not None:
        # E[(Re q̄δ)²] = ½ E|q|² E|δ|²: under RoPE the phase between query and key error runs through all relative positions.
        keys = keys + 0.5 * _plane_errors(moments.planes, sets, head_dim_multiple)
    if moments.keys is not None:
        keys = keys + _truncated_energy(moments.keys, sets, head_dim_multiple)
    return keys, _truncated_energy(moments.values, sets, head_dim_multiple) if values else nothing


def grouped_error(moments: Moments, groups: Groups, head_dim_multiple: int = 1) -> SiteError:
    """Return the predicted error summed over the groups of a site."""
    found = (predicted_error(moments, list(members), head_dim_multiple=head_dim_multiple) for members in groups.members)
    return sum(found, SiteError(0.0, 0.0))


def _tiny() -> float:
    return torch.finfo(torch.float64).tiny


def _plane_errors(planes: Planes, sets: Int[Tensor, "set member"], head_dim_multiple: int) -> Float[Tensor, " set"]:
    weighted = planes.weighted[:, sets[:, :, None], sets[:, None, :]]
    total = torch.diagonal(weighted, dim1=2, dim2=3).real.sum((0, 2))
    return (total - torch.linalg.eigvalsh(weighted)[..., -head_dim_multiple:].sum((0, 2))).double()


def _truncated_energy(
    weighted: WeightedGram, sets: Int[Tensor, "set member"], head_dim_multiple: int
) -> Float[Tensor, " set"]:
    """Return the energy outside the leading directions, of which the shared head keeps as many as it has dims."""
    dim = weighted.gram.shape[1]
    by_pair = rearrange(weighted.gram, "i a l b -> i l a b")
    size = sets.shape[1] * dim
    at_once = max(1, BATCH // size**2)
    found = []
    for some in sets.split(at_once):
        grams = rearrange(by_pair[some[:, :, None], some[:, None, :]], "n i l a b -> n (i a) (l b)")
        total = torch.diagonal(grams, dim1=1, dim2=2).sum(1)
        found.append(total - leading_energy(grams, head_dim_multiple * dim))
    return torch.cat(found).clamp_min(0).double()


def leading_energy(grams: Float[Tensor, "set size size"], num_kept: int) -> Float[Tensor, " set"]:
    """Return the sum of the `num_kept` largest eigenvalues of each matrix."""
    if grams.shape[1] <= DIRECT or num_kept * FEW > grams.shape[1]:
        return torch.linalg.eigvalsh(grams)[:, -num_kept:].clamp_min(0).sum(1)
    from scipy.sparse.linalg import eigsh

    sums = [eigsh(gram.numpy(), k=num_kept, return_eigenvectors=False, tol=1e-6).sum() for gram in grams]
    return torch.tensor(sums, dtype=grams.dtype)
