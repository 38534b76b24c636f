"""What a shared head is predicted to lose, before anything is folded: K in logit², V in output², kept apart."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .groups import Groups
from .moments import Moments, Planes, Weighted
from .shared import align_signs


@dataclass(frozen=True, slots=True)
class SiteError:
    """Mean squared error per token, summed over the query heads: `key` in logit² (before the softmax scale), `value` in output²."""

    key: float
    value: float

    def __add__(self, other: "SiteError") -> "SiteError":
        return SiteError(self.key + other.key, self.value + other.value)


def site_energy(moments: Moments) -> SiteError:
    """What would be lost if K, or V, were dropped altogether: the scale for relative errors."""
    key = 0.0
    if moments.planes is not None:
        key += _half(torch.diagonal(moments.planes.weighted, dim1=1, dim2=2).real.sum())
    if moments.keys is not None:
        key += float(torch.einsum("iaia->", moments.keys.gram))
    return SiteError(max(key, _tiny()), max(float(torch.einsum("iaia->", moments.values.gram)), _tiny()))


def predicted_error(moments: Moments, members: list[int], *, values: bool = True) -> SiteError:
    """The error of the best head that `members` can share (docs/absorb.md), `values=False` to leave V out (0)."""
    if len(members) == 1:
        return SiteError(0.0, 0.0)
    key = 0.0
    if moments.planes is not None:
        key += _half(_plane_error(moments.planes, members))
    if moments.keys is not None:
        key += _tail(moments.keys, members)
    return SiteError(key, _tail(moments.values, members) if values else 0.0)


def grouped_error(moments: Moments, groups: Groups) -> SiteError:
    """Summed over the groups of a site."""
    return sum((predicted_error(moments, list(members)) for members in groups.members), SiteError(0.0, 0.0))


def _half(product_energy: Tensor) -> float:
    # E[(Re q̄δ)²] = ½ E|q|² E|δ|²: under RoPE the phase between query and key error runs through all relative positions.
    return 0.5 * float(product_energy)


def _tiny() -> float:
    return torch.finfo(torch.float64).tiny


def _plane_error(planes: Planes, members: list[int]) -> Tensor:
    weighted = planes.weighted[:, members][:, :, members]
    total = torch.diagonal(weighted, dim1=1, dim2=2).real.sum()
    if planes.normed:
        energy = planes.energy[:, members]
        product = energy[:, :, None] * planes.gram.real[:, members][:, :, members] * energy[:, None, :]
        signs = align_signs(product)
        return total - (torch.einsum("fi,fil,fl->f", signs, product, signs) / energy.sum(1)).sum()
    return total - torch.linalg.eigvalsh(weighted)[:, -1].sum()


def _tail(weighted: Weighted, members: list[int]) -> float:
    """Energy beyond the `dim` leading directions."""
    gram = weighted.gram[members][:, :, members]
    values = torch.linalg.eigvalsh(rearrange(gram, "i a l b -> (i a) (l b)"))
    return float(values[: -gram.shape[1]].clamp_min(0).sum())
