"""Share the best K/V head there is, and fold each query head's private read-out of it into W_q and W_o.

Minimises, per group and with queries and keys taken as independent, the expected squared error of the attention logits
(K) and of the block's output (V) over everything that costs nothing at inference: query head i reads the shared head
through its own matrix T_i (folded into W_q) and S_i (folded into W_o). Closed form (docs/absorb.md):
the leading eigenvectors of the Gram matrix of the group's heads, weighed by query energy and by W_o. Under RoPE, T_i must commute with
the rotation: one complex number per frequency plane, so each plane keeps one of the group's functionals. Without
position on K, and always for V, T_i and S_i are unrestricted and the best `dim` of all the group's directions stay.
Under q/k-norm T_i is a sign per plane, and the shared key is the energy-weighted mean of the aligned, normalised keys.

Undoes every transformation that `key_freedom` allows, on K, and any invertible one on V: exact for heads that differ by those.
Needs the statistics `second` and `scatter`; cost: one eigenproblem of (group size · dim)² per group.
"""

import dataclasses

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.groups import Groups
from ..core.heads import Heads
from ..core.moments import Moments, Planes, Weighted, site_moments
from ..core.shared import align_signs, top_functionals, top_planes
from ..core.stats import SiteStats

NEEDS = ("second", "scatter")
"""Statistics it cannot do without."""
HEAD_WIDTH = True
"""Shared heads may be several of the source's wide."""


def merge(
    heads: Heads,
    groups: Groups,
    stats: SiteStats | None = None,
    *,
    seed: int = 0,
    head_width: int = 1,
    query_weighting: bool = True,
    output_weighting: bool = True,
) -> Heads:
    """`groups` partitions the source's K/V heads. Computed in float64 and returned in it.

    A shared head is `head_width` of the source's wide (docs/absorb.md, 7): that many slots of the source's dims, each of
    which rotates as a head of the source does. A group of no more heads than slots loses nothing.

    Raises:
        UserError: no statistics.
    """
    if stats is None:
        raise UserError(
            "absorb needs calibration statistics: run headfold calibrate and pass --stats, or pick --merge mean"
        )
    heads = heads.to(torch.float64)
    moments = site_moments(heads, stats, query_weighting=query_weighting, output_weighting=output_weighting)
    kept = [members[0] for members in groups.members]
    merged = dataclasses.replace(
        heads,
        q=_widened(heads.q, head_width),
        k=_widened(heads.k[kept], head_width),
        v=_widened(heads.v[kept], head_width),
        o=_widened(heads.o, head_width),
        kv_of_query=heads.kv_of_query.compose(groups),
    )
    shift = torch.zeros(heads.o.shape[2], dtype=torch.float64)
    for group, members in enumerate(groups.members):
        if len(members) > 1:
            shift += _absorb_group(heads, merged, group, moments, stats, list(members), head_width)
    return merged if heads.o_bias is None else dataclasses.replace(merged, o_bias=heads.o_bias + shift)


def _widened(rows: Float[Tensor, "head dim model"], head_width: int) -> Float[Tensor, "head dim model"]:
    """A copy with empty slots behind the first."""
    empty = rows.new_zeros(len(rows), (head_width - 1) * rows.shape[1], rows.shape[2])
    return torch.cat([rows, empty], 1)


def _absorb_group(
    heads: Heads,
    merged: Heads,
    group: int,
    moments: Moments,
    stats: SiteStats,
    members: list[int],
    head_width: int,
) -> Float[Tensor, " model"]:
    """Writes the shared head and its read-outs into `merged`, in place. Returns what the mean of V adds to the output."""
    shared, readout = _shared_key(heads, moments, members, head_width)
    values, value_readout = _shared_flat(heads.v, moments.values, members, head_width)
    shift = torch.zeros(heads.o.shape[2], dtype=torch.float64)
    for query, kv_head in enumerate(heads.kv_of_query.kv_of_query):
        if kv_head not in members:
            continue
        place = members.index(kv_head)
        if moments.value_mean is not None:
            centre = value_readout[place] @ (values @ stats.mean("second")[:, -1])
            shift += (moments.value_mean[kv_head] - centre) @ heads.o[query]
        merged.q[query] = readout[place].mT @ heads.q[query]
        merged.o[query] = value_readout[place].mT @ heads.o[query]
    merged.k[group], merged.v[group] = shared, values
    return shift


def _shared_key(heads: Heads, moments: Moments, members: list[int], head_width: int) -> tuple[Tensor, Tensor]:
    """Shared K head (slot · dim, model+1) and each member's read-out T (member, dim, slot · dim).

    In every slot the rotating planes come first, then the rest.
    """
    rotary, dim = heads.key_freedom.rotary_dim, heads.head_dim
    readout = heads.k.new_zeros(len(members), dim, head_width, dim)
    shared = heads.k.new_zeros(head_width, dim, heads.k.shape[2])
    if moments.planes is not None and heads.key_freedom.normed:
        shared[0, :rotary], readout[:, :rotary, 0, :rotary] = _shared_signs(heads, moments.planes, members)
    elif moments.planes is not None:
        shared[:, :rotary], readout[:, :rotary, :, :rotary] = _shared_planes(heads, moments.planes, members, head_width)
    if moments.keys is not None:
        rows, flat = _shared_flat(heads.k[:, rotary:], moments.keys, members, head_width)
        shared[:, rotary:] = rearrange(rows, "(slot dim) m -> slot dim m", slot=head_width)
        readout[:, rotary:, :, rotary:] = rearrange(flat, "member a (slot b) -> member a slot b", slot=head_width)
    return shared.flatten(0, 1), readout.flatten(2)


def _shared_flat(
    rows: Float[Tensor, "group dim m"], weighted: Weighted, members: list[int], head_width: int = 1
) -> tuple[Tensor, Tensor]:
    """Unrestricted read-outs: A = Σ^-½ Uᵀ W̃ and T_i = M_i^-½ U_i Σ^½ (balanced), docs/absorb.md, 2."""
    dim = rows.shape[1]
    vectors, values = top_functionals(weighted.gram[members][:, :, members], head_width * dim)
    if (missing := head_width * dim - len(values)) > 0:  # fewer directions than dims: the others stay empty
        vectors, values = (nn.functional.pad(t, (0, missing)) for t in (vectors, values))
    # The fourth root of the eigenvalue splits the scale evenly between the shared head and its read-outs.
    scale = values.clamp_min(torch.finfo(values.dtype).tiny).pow(0.25)
    shared = torch.einsum("iad,iam->dm", vectors / scale, weighted.root[members] @ rows[members])
    return shared, weighted.inverse_root[members] @ (vectors * scale)


def _shared_planes(
    heads: Heads, planes: Planes, members: list[int], head_width: int
) -> tuple[Float[Tensor, "slot rotary m"], Float[Tensor, "member rotary slot rotary"]]:
    """One complex number per plane, member and slot: a = uᴴ y, t_i = u_i / √energy_i, docs/absorb.md, 3."""
    first, other = heads.key_freedom.planes().T
    vectors, values = top_planes(planes.weighted[:, members][:, :, members], head_width)
    energy = planes.energy[:, members].sqrt()
    z = torch.complex(heads.k[members][:, first], heads.k[members][:, other])
    rows = z.real.new_zeros(head_width, heads.key_freedom.rotary_dim, z.shape[2])
    readout = rows.new_zeros(len(members), rows.shape[1], head_width, rows.shape[1])
    for slot in range(values.shape[1]):
        u = vectors[..., slot]
        scale = values[:, slot, None].clamp_min(torch.finfo(values.dtype).tiny).pow(0.25)
        shared = torch.einsum("fi,ifm->fm", (u.conj() * energy / scale), z)
        factors = rearrange(u * scale / energy, "plane member -> member plane")
        rows[slot], readout[:, :, slot] = _from_complex(heads, shared, factors)
    return rows, readout


def _shared_signs(heads: Heads, planes: Planes, members: list[int]) -> tuple[Tensor, Tensor]:
    """One sign per plane and member; the shared key is the energy-weighted mean of the aligned, normalised keys."""
    first, other = heads.key_freedom.planes().T
    energy = planes.energy[:, members]
    signs = align_signs(energy[:, :, None] * planes.gram.real[:, members][:, :, members] * energy[:, None, :])
    weight = energy * signs / energy.sum(1, keepdim=True) / planes.scale[members]
    z = torch.complex(heads.k[members][:, first], heads.k[members][:, other])
    shared = torch.einsum("fi,ifm->fm", weight.to(z.dtype), z)
    return _from_complex(heads, shared, rearrange(signs.to(z.dtype), "plane member -> member plane"))


def _from_complex(heads: Heads, shared: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Complex functionals (plane, m) and factors (member, plane) as real rows and real 2 × 2 blocks of T."""
    first, other = heads.key_freedom.planes().T
    rows = heads.k.new_zeros(heads.key_freedom.rotary_dim, shared.shape[1])
    rows[first], rows[other] = shared.real, shared.imag
    readout = heads.k.new_zeros(len(factors), len(rows), len(rows))
    readout[:, first, first], readout[:, other, other] = factors.real, factors.real
    readout[:, first, other], readout[:, other, first] = -factors.imag, factors.imag
    return rows, readout
