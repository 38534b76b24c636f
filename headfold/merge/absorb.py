"""Share the best possible K/V head, and fold each query head's read-out of it into W_q and W_o.

Minimises, per group and with queries and keys taken as independent, the expected squared error of the attention logits (K) and of
the block's output (V) over everything that costs nothing at inference: query head i reads the shared head through its own matrix
T_i (folded into W_q) and S_i (folded into W_o). The solution is closed-form (docs/absorb.md): the leading eigenvectors of the
Gram matrix of the group's heads, weighted by query energy and by W_o. Under RoPE, T_i must commute with the rotation: it is one
complex number per frequency plane, so each plane keeps one of the group's functionals. Without position on K, and always for V,
T_i and S_i are unrestricted, and the best `dim` of all the group's directions are kept. Where the frequencies of the planes are
known, T_i and the shared key are then fitted by alternation over the distances that attention covers: a plane that rotates little
over them is nearly as free as a dim without position (`core.readout`). Under q/k-norm all this is done with the norms held at their
root mean square (`core.norms`), and the shared key is written in the basis in which it is nearest to a member's own.

It undoes every transformation that `key_freedom` allows on K, and any invertible one on V: exact for heads that differ by those.
It needs the statistics `second` and `scatter`, and uses `attended` where it was measured. Cost: one eigenproblem of size (group
size · dim) per group.
"""

import dataclasses

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..core.distances import NUM_BINS, Distances
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.heads import Heads
from ..core.methods import MergeMethod
from ..core.moments import Moments, Planes, WeightedGram, WholeKeys, site_moments
from ..core.natural import natural_basis, plane_blocks
from ..core.norms import with_norms, without_norms
from ..core.readout import fit
from ..core.shared import top_functionals, top_planes, used
from ..core.stats import SiteStats

NORMED_RIDGE = 0.03
"""Ridge of the fit over distances under q/k-norm (`core.readout.fit`). Without one, a read-out is a small difference of large terms, which
the norm of queries would see in place of what they add up to."""


def merge(
    heads: Heads,
    groups: Groups,
    stats: SiteStats | None = None,
    *,
    seed: int = 0,
    head_dim_multiple: int = 1,
    query_weighting: bool = True,
    output_weighting: bool = True,
    distances: bool = True,
) -> Heads:
    """Return merged heads, computed in float64 and of that dtype. `groups` partitions the source's K/V heads.

    A shared head has `head_dim_multiple` times the source's head_dim (docs/absorb.md, 7): that many slots of the source's dims,
    each of which rotates as a head of the source does. A group with at most as many heads as slots loses nothing.
    `distances=False` leaves out the fit over distances, so that each plane is shared separately.

    Raises:
        UserError: there are no statistics.
    """
    if stats is None:
        raise UserError(
            "absorb needs calibration statistics: run headfold calibrate and pass --stats, or choose --merge mean"
        )
    source = heads.to(torch.float64)
    heads = without_norms(source, stats)
    fits_over_distances = distances and bool(heads.key_freedom.frequencies)
    moments = site_moments(
        heads,
        stats,
        query_weighting=query_weighting,
        output_weighting=output_weighting,
        whole_keys=fits_over_distances or source.key_freedom.normed,
    )
    kept = [members[0] for members in groups.members]
    merged = dataclasses.replace(
        heads,
        q=_with_slots(heads.q, head_dim_multiple),
        k=_with_slots(heads.k[kept], head_dim_multiple),
        v=_with_slots(heads.v[kept], head_dim_multiple),
        o=_with_slots(heads.o, head_dim_multiple),
        groups=heads.groups.compose(groups),
    )
    shift = torch.zeros(heads.o.shape[2], dtype=torch.float64)
    for group, members in enumerate(groups.members):
        if len(members) > 1:
            mix, readout = _shared_key(heads, moments, list(members), head_dim_multiple)
            if fits_over_distances and moments.whole_keys is not None:
                ridge = NORMED_RIDGE if source.key_freedom.normed else 0.0
                mix, readout = _fit_over_distances(heads, moments.whole_keys, stats, list(members), mix, readout, ridge)
            if source.key_freedom.normed and moments.whole_keys is not None:
                mix, readout = natural_basis(heads.key_freedom, moments.whole_keys, list(members), mix, readout)
            merged.k[group] = mix @ heads.k[list(members)].flatten(0, 1)
            shift += _absorb_group(heads, merged, group, moments, stats, list(members), readout, head_dim_multiple)
    if source.key_freedom.normed:
        merged = with_norms(merged, source, stats)
    return merged if heads.o_bias is None else dataclasses.replace(merged, o_bias=heads.o_bias + shift)


def _with_slots(rows: Float[Tensor, "head dim model"], head_dim_multiple: int) -> Float[Tensor, "head wide_dim model"]:
    """Return a copy with empty slots after the first."""
    empty = rows.new_zeros(len(rows), (head_dim_multiple - 1) * rows.shape[1], rows.shape[2])
    return torch.cat([rows, empty], 1)


def _absorb_group(
    heads: Heads,
    merged: Heads,
    group: int,
    moments: Moments,
    stats: SiteStats,
    members: list[int],
    readout: Float[Tensor, "member dim shared"],
    head_dim_multiple: int,
) -> Float[Tensor, " model"]:
    """Write the shared V head and all read-outs into `merged`, in place. Return what the mean of V adds to the output."""
    value_mix, value_readout = _shared_flat(moments.values, members, head_dim_multiple)
    values = value_mix @ heads.v[members].flatten(0, 1)
    shift = torch.zeros(heads.o.shape[2], dtype=torch.float64)
    for query, kv_head in enumerate(heads.groups.group_of_head):
        if kv_head not in members:
            continue
        place = members.index(kv_head)
        if moments.value_mean is not None:
            centre = value_readout[place] @ (values @ stats.mean_input())
            shift += (moments.value_mean[kv_head] - centre) @ heads.o[query]
        merged.q[query] = readout[place].mT @ heads.q[query]
        merged.o[query] = value_readout[place].mT @ heads.o[query]
    merged.v[group] = values
    return shift


def _shared_key(heads: Heads, moments: Moments, members: list[int], head_dim_multiple: int) -> tuple[Tensor, Tensor]:
    """Return the shared K head as a map of the members' (slot · dim, member · dim), and each member's read-out T (member, dim,
    slot · dim).

    In every slot the rotary planes come first, then the other dims.
    """
    rotary, dim = heads.key_freedom.rotary_dim, heads.head_dim
    readout = heads.k.new_zeros(len(members), dim, head_dim_multiple, dim)
    mix = heads.k.new_zeros(head_dim_multiple, dim, len(members), dim)
    if moments.planes is not None:
        mix[:, :rotary, :, :rotary], readout[:, :rotary, :, :rotary] = _shared_planes(
            heads, moments.planes, members, head_dim_multiple
        )
    if moments.keys is not None:
        rows, flat = _shared_flat(moments.keys, members, head_dim_multiple)
        mix[:, rotary:, :, rotary:] = rearrange(
            rows, "(slot dim) (member b) -> slot dim member b", slot=head_dim_multiple, member=len(members)
        )
        readout[:, rotary:, :, rotary:] = rearrange(
            flat, "member a (slot b) -> member a slot b", slot=head_dim_multiple
        )
    return mix.flatten(2).flatten(0, 1), readout.flatten(2)


def _fit_over_distances(
    heads: Heads, keys: WholeKeys, stats: SiteStats, members: list[int], mix: Tensor, readout: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Fit both further over the distances that calibration measured, or over assumed ones."""
    freedom = heads.key_freedom
    seen = stats.tensors.get("attended")
    if seen is not None and seen.shape != (heads.num_kv_heads, NUM_BINS):
        raise UserError(
            f"statistics: attended: expected shape {(heads.num_kv_heads, NUM_BINS)}, got {tuple(seen.shape)}, which another version of "
            "headfold wrote; calibrate again"
        )
    context = freedom.context
    distances = Distances.assumed(heads.num_kv_heads, context) if seen is None else Distances.measured(seen, context)
    second, scatter = (gram[members][:, :, members] for gram in (keys.second, keys.scatter))
    fitted = fit(second, scatter, keys.queries[members], mix, readout, freedom, distances.of(members), ridge)
    return (mix, readout) if fitted is None else _balanced(heads, keys, members, fitted.mix, fitted.readout)


def _balanced(heads: Heads, keys: WholeKeys, members: list[int], mix: Tensor, readout: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the scale of every plane split evenly between the shared head and its read-outs, for half precision."""
    gram = keys.second[members][:, :, members].flatten(2).flatten(0, 1)
    key = (mix @ gram * mix).sum(1)
    query = torch.einsum("mad,mab,mbd->d", readout, keys.queries[members], readout)
    of_planes = (t.unflatten(0, (-1, heads.head_dim)) for t in (key, query))
    key, query = (_over_planes(heads, t).flatten() for t in of_planes)
    scale = torch.where((key > 0) & (query > 0), query / key, 1.0).pow(0.25)
    return mix * scale[:, None], readout / scale


def _over_planes(heads: Heads, energy: Float[Tensor, "slot dim"]) -> Float[Tensor, "slot dim"]:
    """Return the energy of each dim's plane: the two dims of a plane must have one scale, or their rotation would be lost."""
    first, other = heads.key_freedom.planes().T
    energy = energy.clone()
    energy[:, first] = energy[:, other] = energy[:, first] + energy[:, other]
    return energy


def _shared_flat(weighted: WeightedGram, members: list[int], head_dim_multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return the shared head and its unrestricted read-outs: A = Σ^-½ Uᵀ W̃ and T_i = M_i^-½ U_i Σ^½ (balanced), docs/absorb.md,
    2."""
    dim = weighted.root.shape[1]
    vectors, values = top_functionals(weighted.gram[members][:, :, members], head_dim_multiple * dim)
    if (missing := head_dim_multiple * dim - len(values)) > 0:  # fewer directions than dims: the others stay empty
        vectors, values = (nn.functional.pad(t, (0, missing)) for t in (vectors, values))
    # The fourth root of the eigenvalue splits the scale evenly between the shared head and its read-outs.
    scale = used(values).pow(0.25)
    mix = torch.einsum("iad,iab->dib", vectors / scale, weighted.root[members]).flatten(1)
    return mix, weighted.inverse_root[members] @ (vectors * scale)


def _shared_planes(
    heads: Heads, planes: Planes, members: list[int], head_dim_multiple: int
) -> tuple[Float[Tensor, "slot rotary member rotary"], Float[Tensor, "member rotary slot rotary"]]:
    """Return one complex number per plane, member and slot as real blocks: a = uᴴ y, t_i = u_i / √energy_i, docs/absorb.md, 3."""
    vectors, values = top_planes(planes.weighted[:, members][:, :, members], head_dim_multiple)
    energy = planes.energy[:, members].sqrt()
    rotary = heads.key_freedom.rotary_dim
    mix = heads.k.new_zeros(head_dim_multiple, rotary, len(members), rotary)
    readout = heads.k.new_zeros(len(members), rotary, head_dim_multiple, rotary)
    scales = used(values).pow(0.25)
    for slot in range(values.shape[1]):
        u, scale = vectors[..., slot], scales[:, slot, None]
        mix[slot] = rearrange(
            plane_blocks(heads.key_freedom, (u.conj() * energy / scale).mT), "member a b -> a member b"
        )
        readout[:, :, slot] = plane_blocks(heads.key_freedom, (u * scale / energy).mT)
    return mix, readout


MERGE = MergeMethod(
    merge=merge,
    undoes="key_freedom",
    statistics=frozenset({"second", "scatter", "attended"}),
    head_dim_multiples=True,
)
