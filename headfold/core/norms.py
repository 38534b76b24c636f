"""Heads whose queries and keys pass a norm, as heads without one, and back.

A norm divides q = W_q x by its root mean square over the dims of a head, or of all heads, and multiplies it by gains. Over the tokens of
a text that root mean square varies little beside the directions of q, so that with its mean in its place queries and keys are linear
functions of the input again, and all that is known of heads without norms holds (docs/absorb.md, 8). On the way back the gains are
divided out. Under a norm of each head, the scale of a head cannot be said: all query heads of a site share one temperature, which is
fitted. Under a norm of all heads, every dim has a gain of its own, so rows may have any scale: those are taken with which the root mean
square of the rows that are left is nearest to that of the original's rows.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .heads import Heads, KeyFreedom
from .shared import used
from .stats import SiteStats

_SMALLEST_GAIN = 1e-3
"""Gains below this share of the largest are not divided out: such a dim only counts in the norm."""
_UPDATES = 200
_SMALLEST_SCALE = 1e-2
"""Scales stay above this, and below its inverse, so that gains keep a sensible size."""


def without_norms(heads: Heads, stats: SiteStats) -> Heads:
    """Return heads without norms whose queries and keys are those of `heads` with each root mean square held at its mean.

    Heads without norms are returned as they are.
    """
    freedom = heads.key_freedom
    if not freedom.normed:
        return heads
    query, key = _moments(stats, heads.q.dtype)
    q, k = (
        _gained(gain, rows) / _lengths(rows, second, freedom.norm_spans_heads)[:, None, None]
        for rows, gain, second in ((heads.q, heads.gain("q"), query), (heads.k, heads.gain("k"), key))
    )
    return replace(
        heads, q=q.to(heads.q), k=k.to(heads.k), key_freedom=freedom.without_norm(), q_gain=None, k_gain=None
    )


def with_norms(linear: Heads, source: Heads, stats: SiteStats) -> Heads:
    """Return `linear`, folded from `without_norms(source)`, as heads of the norms that `source` has.

    Query heads must be in the order of the source. A dim whose gain is near zero keeps what the source's first member has there.
    """
    if linear.num_kv_heads == source.num_kv_heads:  # only the order of the K heads is another, if any
        own = [source.groups.group_of_head[members[0]] for members in linear.groups.members]
        gain = source.k_gain if source.k_gain is None or source.k_gain.ndim == 1 else source.k_gain[own]
        kept: dict[str, Any] = {"q": source.q, "k": source.k[own], "q_gain": source.q_gain, "k_gain": gain}
        return replace(linear, **kept, key_freedom=source.key_freedom)
    if source.key_freedom.norm_spans_heads:
        return _with_common_norms(linear, source, stats)
    query, key = _moments(stats, linear.q.dtype)
    reads = torch.tensor(linear.groups.group_of_head)
    members = [sorted({source.groups.group_of_head[head] for head in heads}) for heads in linear.groups.members]
    first = torch.tensor([each[0] for each in members])
    own_q, own_k = source.q.double(), source.k.double()
    of_q, of_k = lengths(own_q, query), lengths(own_k, key)
    k = _without_gain(source.gain("k"), linear.k, own_k[first], of_k[first])
    forms = [_forms(rows, (own_k / of_k[:, None, None])[each], key) for rows, each in zip(k, members, strict=True)]
    scale = torch.stack([_scales(*form, _ties(source.key_freedom, k.shape[1])) for form in forms])
    k = k * scale[..., None]
    # What scales a plane of a key is undone on the queries that read it.
    q = _without_gain(source.gain("q"), linear.q / scale[reads][..., None], own_q, of_q)
    of_key = lengths(k, key)
    wanted = own_q / of_q[:, None, None]
    forms = [_forms(rows * of_key[group], own[None], query) for rows, own, group in zip(q, wanted, reads, strict=True)]
    gram, products = (torch.stack(each).sum(0) for each in zip(*forms, strict=True))
    shared = _scales(gram, products, torch.arange(q.shape[1]))
    gain = source.gain("q")
    gain = q.new_ones(q.shape[1]) if gain is None else gain
    q = q * shared[:, None]
    return replace(
        linear,
        q=q * (of_q / lengths(q, query))[:, None, None],
        k=k * (of_k[first] / of_key)[:, None, None],
        q_gain=gain / shared - source.gain_offset,
        k_gain=source.k_gain,
        key_freedom=source.key_freedom,
    )


def _with_common_norms(linear: Heads, source: Heads, stats: SiteStats) -> Heads:
    """Return the heads under one norm of all query heads and one of all K heads."""
    first = torch.tensor([members[0] for members in linear.groups.members])
    member = torch.tensor(source.groups.group_of_head)[first]
    found: dict[str, Any] = {}
    (query, key), every = _moments(stats, linear.q.dtype), torch.arange(source.num_heads)
    for role, rows, own, second, kept in (
        ("q", linear.q, source.q, query, every),
        ("k", linear.k, source.k, key, member),
    ):
        own, gain = own.double(), source.gain("q" if role == "q" else "k")
        length = _lengths(own, second, True)
        gain = own.new_ones(own.shape[:2]) if gain is None else gain
        rows = _without_gain(gain[kept], rows, own[kept], length[kept])
        flat = rows.flatten(0, 1)
        scale = _scales(*_forms(flat, own / length[:, None, None], second), torch.arange(len(flat))).view(
            rows.shape[:2]
        )
        found |= {
            role: rows * scale[..., None] * length[kept][:, None, None],
            f"{role}_gain": gain[kept] / scale - source.gain_offset,
        }
    return replace(linear, **found, key_freedom=source.key_freedom)


def _forms(
    rows: Float[Tensor, "row m"], source: Float[Tensor, "head dim m"], second: Float[Tensor, "m m"]
) -> tuple[Float[Tensor, "row row"], Float[Tensor, " row"]]:
    """Return the Gram matrix of the quadratic forms (row · x)², and their products with the mean of the source's.

    They are those of normally distributed inputs with these second moments: E[xᵀA x · xᵀB x] = tr A C tr B C + 2 tr A C B C.
    """
    whole = source.flatten(0, 1)
    second = second.to(rows)
    seen = rows @ second
    between, across = (seen @ rows.mT).square(), (seen @ whole.mT).square()
    energy, total = (seen * rows).sum(1), torch.einsum("rm,mn,rn->", whole, second, whole)
    return 2 * between + torch.outer(energy, energy), (2 * across.sum(1) + energy * total) * len(rows) / len(whole)


def _scales(
    gram: Float[Tensor, "row row"], wanted: Float[Tensor, " row"], ties: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Return the scales of rows with which the mean of their squares is nearest to that of the source's rows; tied rows have one.

    Nearest is the least mean squared difference. The squared scales are found by multiplicative updates, which keep them positive (Lee &
    Seung 2001); rows that are already right stay as they are.
    """
    size = int(ties.max()) + 1
    tied = gram.new_zeros(size, size).index_put((ties[:, None], ties), gram, accumulate=True)
    wanted = wanted.new_zeros(size).index_add(0, ties, wanted)
    squares = torch.ones_like(wanted)
    for _ in range(_UPDATES):
        squares = squares * wanted / (tied @ squares).clamp_min(torch.finfo(gram.dtype).tiny)
    return squares.clamp(_SMALLEST_SCALE**2, _SMALLEST_SCALE**-2).sqrt()[ties]


def _ties(freedom: KeyFreedom, dim: int) -> Int[Tensor, " dim"]:
    """Return the number of each dim's plane; dims without position have numbers of their own."""
    planes = freedom.planes()
    ties = torch.arange(dim) + len(planes)
    ties[planes[:, 0]] = ties[planes[:, 1]] = torch.arange(len(planes))
    return torch.unique(ties, return_inverse=True)[1]


def lengths(rows: Float[Tensor, "head dim m"], second: Float[Tensor, "m m"]) -> Float[Tensor, " head"]:
    """Return the root mean square of each head over tokens and dims; 1 where all are zero."""
    return used(torch.einsum("hdm,hdm->h", rows @ second.to(rows), rows).double() / rows.shape[1]).sqrt()


def _lengths(rows: Float[Tensor, "head dim m"], second: Float[Tensor, "m m"], together: bool) -> Float[Tensor, " head"]:
    """Return those of each head, or that of all heads `together`, for each of them."""
    found = lengths(rows, second)
    return found.square().mean().sqrt().expand_as(found) if together else found


def _moments(stats: SiteStats, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the second moments of the inputs of queries and of keys."""
    key = stats.mean("second").to(dtype)
    return (stats.mean("query_second").to(dtype) if "query_second" in stats.tensors else key), key


def _gained(gain: Tensor | None, rows: Float[Tensor, "head dim m"]) -> Float[Tensor, "head dim m"]:
    return rows if gain is None else rows * gain.to(rows)[..., None]


def _without_gain(
    gain: Tensor | None,
    rows: Float[Tensor, "head dim m"],
    source: Float[Tensor, "head dim m"],
    length: Float[Tensor, " head"],
) -> Float[Tensor, "head dim m"]:
    """Return rows divided by the gains, with the source's own, of length 1, where a gain is near zero."""
    if gain is None:
        return rows
    gain = gain.to(rows)
    kept = gain.abs() > _SMALLEST_GAIN * gain.abs().amax()
    divided = rows / torch.where(kept, gain, 1.0)[..., None]
    return torch.where(kept[..., None], divided, source.to(rows) / length.to(rows)[:, None, None])
