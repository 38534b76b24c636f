"""Refits W_q of every query head to the attention of the original, with the shared keys fixed.

Minimises the cross-entropy between the original's attention p and the fold's p̂, Σ_t −Σ_s p_ts log p̂_ts, over W_q. With keys fixed it is
convex, a logistic regression per head; a merge fits the logits by least squares instead, in which a key that nobody attends to counts as
much as one that everybody does. One Newton step: conjugate gradients (Hestenes & Stiefel 1952) on the curvature, its covariances of keys
taken under (p + p̂) / 2, since under p̂ alone a key that p̂ has lost does not count; preconditioned by its Kronecker factorisation
(Martens & Grosse 2015, 1503.05671). Then a search along the step, on queries that the step was not fitted to, so that no head gets worse.

Queries are a sample, since attention is smooth in them; all keys are seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from ..core.heads import Heads, KeyFreedom
from ..core.products import self_product
from ..core.query_sample import num_sampled_queries
from ..core.stats import NARROW
from ..parallel import all_reduce
from .kronecker import Rows, damped, inverse
from .recorded import AttentionInputs, RecordedSite

_LOOKED_AT = 2
"""The calls that are run have so many times the queries that are used: more calls differ more, and each costs its projections."""
_SEARCHED_EVERY = 8
"""One position in so many is left to the search."""
_LENGTHS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Lengths of the step that are tried; the best is then found between them."""
_DAMPING = 1e-2
"""Added to both Kronecker factors, relative to their mean energy; to that of the inputs more where queries are few."""
_MOVED_HEADS = 4
"""Heads from which it is found what the module does to a query."""
_LINEAR = 0.03
"""Largest relative error of the queries, computed from W_q, against those that the module passes to its attention."""
_GOLDEN = 0.6180339887
_ELEMENTS = 2**25
"""Logits held at once."""
_KEPT = 2**28
"""Weights that are kept between steps, on each process."""
_PARTS = 4
"""Parts of the queries of a causal call; the keys behind the last query of a part are skipped."""

Queries = Float[Tensor, "batch head query dim"]
Logits = Float[Tensor, "batch head query key"]


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Some queries of one recorded call, with all keys that they may attend to."""

    inputs: Float[Tensor, "batch query size"]
    turn: Complex[Tensor, "batch query plane"] | None
    """What position does to each frequency plane of the query, as the module did it."""
    factor: Float[Tensor, ""]
    """What the module multiplied the dims without position by (Whisper: by what others multiply logits by)."""
    query: Queries
    key: Float[Tensor, "batch group key dim"]
    target_query: Float[Tensor, "batch head query target_dim"]
    target_key: Float[Tensor, "batch target_group key target_dim"]
    hidden: Tensor | None
    """What to add to the logits; broadcasts to (batch, head, query, key)."""
    target_hidden: Tensor | None
    """The same for the original's heads in their own order."""
    counted: Bool[Tensor, "batch query"] | None
    scaling: float
    quantile: Float[Tensor, " query"]
    """Where a key is drawn from a query's attention; over all queries they cover [0, 1] evenly."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """The queries of a site as linear functions of W_q, and the original's attention for them."""

    freedom: KeyFreedom
    order: Int[Tensor, " head"] | None
    """New position → query head of the original; None where no head moves, which saves a copy of its weights."""

    def turned(self, z: Queries, at: _Sampled, *, back: bool = False) -> Queries:
        """Apply the position of the queries, or its adjoint."""
        if at.turn is None:
            return z * at.factor
        planes = self.freedom.planes().to(z.device)
        turn = (at.turn.conj() if back else at.turn)[:, None]
        moved = torch.complex(z[..., planes[:, 0]], z[..., planes[:, 1]]) * turn
        z = z * at.factor
        z[..., planes[:, 0]], z[..., planes[:, 1]] = moved.real, moved.imag
        return z

    def queries(self, rows: Rows, at: _Sampled) -> Queries:
        """Return the queries that these rows of W_q give."""
        return self.turned(torch.einsum("bts,hds->bhtd", at.inputs.to(rows.dtype), rows), at)

    def pulled(self, gradient: Queries, at: _Sampled) -> Queries:
        """Return the gradient in W_q x for one in the queries, zero where a query does not count."""
        gradient = at.scaling * self.turned(gradient, at, back=True)
        return gradient if at.counted is None else gradient * at.counted[:, None, :, None]

    def target(self, at: _Sampled) -> Logits:
        """Return the original's attention."""
        weights = _logits(at.target_query, at.target_key, at.scaling, at.target_hidden).softmax(-1)
        return weights if self.order is None else weights.index_select(1, self.order)


def _logits(query: Queries, key: Tensor, scaling: float, hidden: Tensor | None = None) -> Logits:
    """Return scaled and masked logits in float32 or better."""
    precise = torch.promote_types(query.dtype, torch.float32)
    grouped = (scaling * query.to(precise)).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    found = (grouped @ key.to(precise).mT).view(*query.shape[:3], -1)
    return found if hidden is None else found.add_(hidden)


def _weighted(weights: Logits, key: Tensor) -> Queries:
    """Return Σ_s weights_ts k_s for every query."""
    grouped = weights.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return (grouped @ key.to(weights.dtype)).view(*weights.shape[:3], -1)


def has_data(site_calls: RecordedSite, heads: Heads) -> bool:
    """Return whether there are queries enough for W_q; fitted to fewer, it follows the words of the calibration data."""
    return site_calls.total_queries(heads.q.device) >= NARROW * (heads.q.shape[2] - 1)


@torch.no_grad()
def refit_queries(site_calls: RecordedSite, heads: Heads, ridge: float, steps: int) -> Heads | None:
    """Return the heads with another `q`; its bias column stays as it is where the site has none.

    None where that cannot be done: the class does not pass its queries to transformers' attention, or they are no linear function of
    W_q with one complex factor per frequency plane (norms).
    """
    if not site_calls.catches_attention or heads.key_freedom.normed:
        return None
    size = heads.q.shape[2] if {"q", "qkv"} & set(site_calls.site.biases) else heads.q.shape[2] - 1
    start = heads.q[..., :size]
    order = site_calls.order.to(start.device)
    moves = bool((order != torch.arange(len(order), device=order.device)).any())
    attention = _Attention(heads.key_freedom, order if moves else None)
    slope, curvature, search = _samples(site_calls, heads, size)
    if any(_total(len(some), start.device) == 0 for some in (slope, curvature, search)):
        return None  # all calls are too short to leave queries out
    if not _is_linear(attention, heads, search):
        return None
    mixtures = _Mixtures(attention, curvature)
    # A step fitted to few queries follows what is particular to them: it is shrunk by the sampling error of their covariance.
    ridge = max(ridge, size / _num_queries(slope, start.device))
    left, right = _factors(mixtures, start, max(_DAMPING, ridge))
    scale = _num_queries(slope, start.device) / _num_queries(curvature, start.device)
    rest, change, direction = -_slope(attention, slope, start), torch.zeros_like(start), torch.zeros_like(start)
    precondition = inverse(left, right * scale)
    energy: Tensor | None = None
    for _ in range(steps):
        preconditioned = precondition(rest)
        before, energy = energy, (rest * preconditioned).sum((1, 2), keepdim=True)
        direction = preconditioned if before is None else preconditioned + _ratio(energy, before) * direction
        image = scale * _curvature(mixtures, direction)
        image += ridge * scale * (left @ direction.double() @ right).to(image)
        length = _ratio(energy, (direction * image).sum((1, 2), keepdim=True))
        change += length * direction
        rest -= length * image
    change *= _lengths(attention, search, change)[:, None, None]
    return replace(heads, q=torch.cat([start + change, heads.q[..., size:]], 2))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where nothing is left to gain."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _samples(
    site_calls: RecordedSite, heads: Heads, size: int
) -> tuple[list[_Sampled], list[_Sampled], list[_Sampled]]:
    """Return the queries of the gradient, of the curvature and of the search. No query of the first two is one of the last."""
    total = site_calls.total_queries(heads.q.device)
    wanted = num_sampled_queries(total, size)
    found: tuple[list[_Sampled], list[_Sampled], list[_Sampled]] = ([], [], [])
    share = min(1.0, _LOOKED_AT * max(wanted) / total)
    left = 1 / _SEARCHED_EVERY
    for number in site_calls.numbers:
        index = site_calls.all_numbers.index(number)
        looked_at = floor(share * index)  # before this call, by all ranks: together they see what one would see alone
        if looked_at == floor(share * (index - 1)):
            continue
        mine, theirs = site_calls.attention_inputs(heads, number), site_calls.attention_inputs(None, number)
        position = torch.arange(mine.query.shape[2], device=mine.query.device)
        searched = (position + looked_at) % _SEARCHED_EVERY == _SEARCHED_EVERY - 1
        kinds = ((position[~searched], 1 - left),) * 2 + ((position[searched], left),)
        for kept, (rows, part), queries in zip(found, kinds, wanted, strict=True):
            every = max(1.0, share * total * part / queries)
            first = _GOLDEN * looked_at % 1 * every  # calls too short for a row each take turns
            chosen = _evenly(len(rows), first, every)
            kept.extend(_parts(mine, theirs, rows[chosen.to(rows.device)], heads, size, number))
    return found


def _evenly(length: int, first: float, every: float) -> Int[Tensor, " row"]:
    """Return the rows below `length` that `first`, `first + every` … lie in."""
    count = max(0, ceil((length - first) / every))
    rows = (first + every * torch.arange(count, dtype=torch.float64)).long()
    return rows[rows < length]  # rounding may carry the last one to `length`


def _total(count: int, device: torch.device) -> float:
    return all_reduce(torch.tensor(float(count), dtype=torch.float64, device=device)).item()


def _parts(
    mine: AttentionInputs, theirs: AttentionInputs, rows: Int[Tensor, " query"], heads: Heads, size: int, number: int
) -> Iterator[_Sampled]:
    """Yield these queries of a call, at most `_ELEMENTS` logits at a time."""
    (batch, num_heads, _, _), keys = mine.query.shape, mine.key.shape[2]
    most = max(1, _ELEMENTS // (batch * num_heads * keys))
    if mine.causal:  # the first rows of a part have keys to skip too
        most = min(most, -(-len(rows) // _PARTS))
    for some in rows.split(most) if len(rows) else ():
        last = min(keys, int(some.max()) + 1) if mine.causal else keys
        hidden = _hidden(mine, some, last)
        target_hidden = hidden if theirs.mask is mine.mask else _hidden(theirs, some, last)
        inputs = mine.inputs[:, some]
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
        query = mine.query[:, :, some]
        yield _Sampled(
            inputs[..., :size], *_moved(inputs, query, heads), query, mine.key[:, :, :last], theirs.query[:, :, some],
            theirs.key[:, :, :last], hidden, target_hidden, None if mine.counted is None else mine.counted[:, some], mine.scaling,
            (_GOLDEN * (some.double() + number * mine.query.shape[2])) % 1,
        )  # fmt: skip


def _hidden(seen: AttentionInputs, rows: Int[Tensor, " query"], last: int) -> Tensor | None:
    """Return what to add to the logits of these queries, which takes less time than filling them in."""
    if seen.causal:
        attends = torch.arange(last, device=rows.device) <= rows[:, None]
    elif seen.mask is None:
        return None
    else:
        attends = seen.mask[:, :, rows] if seen.mask.shape[2] > 1 else seen.mask
    if attends.dtype != torch.bool:
        return attends
    precise = torch.promote_types(seen.query.dtype, torch.float32)
    return torch.zeros(attends.shape, dtype=precise, device=rows.device).masked_fill_(
        ~attends, torch.finfo(precise).min
    )


def _moved(
    inputs: Tensor, query: Queries, heads: Heads
) -> tuple[Complex[Tensor, "batch query plane"] | None, Float[Tensor, ""]]:
    """Return by what the module multiplied every frequency plane of W_q x, and the other dims."""
    step = ceil(len(heads.q) / _MOVED_HEADS)
    some = heads.q[::step]  # what position does is the same for all heads
    before = torch.einsum("bts,hds->bhtd", inputs.to(some.dtype), some)
    after = query[:, ::step].to(some.dtype)
    tiny, turn = torch.finfo(before.dtype).tiny, None
    if heads.key_freedom.rotary_dim:
        planes = heads.key_freedom.planes().to(query.device)
        z, turned = (torch.complex(x[..., planes[:, 0]], x[..., planes[:, 1]]) for x in (before, after))
        turn = (turned * z.conj()).sum(1) / z.abs().square().sum(1).clamp_min(tiny)
    rest = slice(heads.key_freedom.rotary_dim, None)
    factor = (before[..., rest] * after[..., rest]).sum() / before[..., rest].square().sum().clamp_min(tiny)
    return turn, factor


def _is_linear(attention: _Attention, heads: Heads, samples: Sequence[_Sampled]) -> bool:
    """Return whether the queries that `attention` computes are those of the module."""
    sums = torch.zeros(2, dtype=torch.float64, device=heads.q.device)
    for at in samples:
        constant = heads.q[:, None, :, -1] if at.inputs.shape[2] < heads.q.shape[2] else 0
        z = torch.einsum("bts,hds->bhtd", at.inputs.to(heads.q.dtype), heads.q[..., : at.inputs.shape[2]]) + constant
        query = at.query.to(heads.q.dtype)
        sums[0] += (attention.turned(z, at) - query).square().sum()
        sums[1] += query.square().sum()
    missing, energy = all_reduce(sums).tolist()
    return missing <= _LINEAR**2 * energy


def _slope(attention: _Attention, samples: Sequence[_Sampled], rows: Rows) -> Rows:
    """Return the gradient of the cross-entropy at the folded heads, from which the queries were taken."""
    total = torch.zeros_like(rows)
    for at in samples:
        rest = _logits(at.query, at.key, at.scaling, at.hidden).softmax(-1).sub_(attention.target(at))
        total += _projected(attention.pulled(_weighted(rest, at.key), at), at)
    return all_reduce(total)


def _projected(gradient: Queries, at: _Sampled) -> Rows:
    return torch.einsum("bhtd,bts->hds", gradient, at.inputs.to(gradient.dtype))


class _Mixtures:
    """(p + p̂) / 2 of samples, kept from the first time on as far as there is room."""

    def __init__(self, attention: _Attention, samples: Sequence[_Sampled]) -> None:
        self.attention, self.samples = attention, samples
        self._kept: dict[int, Logits] = {}
        self._left = _KEPT

    def __iter__(self) -> Iterator[tuple[_Sampled, Logits]]:
        for number, at in enumerate(self.samples):
            weights = self._kept.get(number)
            if weights is None:
                weights = (
                    _logits(at.query, at.key, at.scaling, at.hidden).softmax(-1).add_(self.attention.target(at)).div_(2)
                )
                if weights.numel() <= self._left:
                    self._kept[number] = weights
                    self._left -= weights.numel()
            yield at, weights


def _curvature(mixtures: _Mixtures, direction: Rows) -> Rows:
    """Return the curvature times a direction."""
    total, attention = torch.zeros_like(direction), mixtures.attention
    for at, weights in mixtures:
        moved = _logits(attention.queries(direction, at), at.key, at.scaling)
        spread = moved.sub_((weights * moved).sum(-1, keepdim=True)).mul_(weights)
        total += _projected(attention.pulled(_weighted(spread, at.key), at), at)
    return all_reduce(total)


def _factors(mixtures: _Mixtures, rows: Rows, damping: float) -> tuple[Tensor, Tensor]:
    """Return the Kronecker factors of the curvature: by head over the dims (a mean over queries), and over the inputs (a sum).

    The covariance of the attended keys is estimated from one key of each query.
    """
    (heads, dim, size), device = rows.shape, rows.device
    left = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
    right = torch.zeros(size, size, dtype=torch.float64, device=device)
    attention = mixtures.attention
    for at, weights in mixtures:
        wanted = at.quantile.to(weights)[:, None].expand(*weights.shape[:3], 1).contiguous()
        chosen = torch.searchsorted(weights.cumsum(-1), wanted)
        key = at.key.repeat_interleave(heads // at.key.shape[1], 1).to(weights.dtype)
        drawn = key.gather(2, chosen.clamp_max(key.shape[2] - 1).expand(-1, -1, -1, key.shape[3]))
        pulled = attention.pulled(drawn - _weighted(weights, at.key), at)
        left += torch.einsum("bhtd,bhte->hde", pulled, pulled)
        x = at.inputs.to(rows.dtype)
        x = (x if at.counted is None else x * at.counted[..., None]).flatten(0, 1)
        right += self_product(x)
    left = all_reduce(left) / _num_queries(mixtures.samples, device)
    return damped(left, _DAMPING), damped(all_reduce(right), damping)


def _num_queries(samples: Sequence[_Sampled], device: torch.device) -> float:
    """Return the number of sampled queries over all ranks, at least 1."""
    own = sum(at.inputs.shape[:2].numel() if at.counted is None else int(at.counted.sum()) for at in samples)
    return max(1.0, _total(own, device))


def _lengths(attention: _Attention, samples: Sequence[_Sampled], step: Rows) -> Float[Tensor, " head"]:
    """Return by head the length of the step that brings the cross-entropy to its least, 0 among them."""
    losses = torch.zeros(len(_LENGTHS), len(step), dtype=torch.float64, device=step.device)
    for at in samples:
        target = attention.target(at)
        here = _logits(at.query, at.key, at.scaling, at.hidden)
        moved = _logits(attention.queries(step, at), at.key, at.scaling)
        counts = 1.0 if at.counted is None else at.counted[:, None].to(here.dtype)
        linear = torch.stack([(target * part).sum(-1) for part in (here, moved)])
        for number, length in enumerate(_LENGTHS):
            loss = (here + length * moved).logsumexp(-1) - linear[0] - length * linear[1]
            losses[number] += (loss * counts).sum((0, 2))
    return _least(all_reduce(losses), torch.tensor(_LENGTHS, dtype=torch.float64, device=step.device)).to(step.dtype)


def _least(losses: Float[Tensor, "length head"], lengths: Float[Tensor, " length"]) -> Float[Tensor, " head"]:
    """Return by head where the parabola through the least of these losses and its neighbours is least; 0 where none is less than at 0."""
    best = losses.argmin(0)
    middle = best.clamp(1, len(lengths) - 2)
    (a, b, c), (low, centre, high) = zip(
        *((lengths[middle + by], losses.gather(0, (middle + by)[None])[0]) for by in (-1, 0, 1)), strict=True
    )
    rise, fall = (b - a) * (centre - high), (b - c) * (centre - low)
    curved = (rise - fall).abs() > 0
    vertex = b - 0.5 * ((b - a) * rise - (b - c) * fall) / torch.where(curved, rise - fall, 1.0)
    vertex = torch.where(curved, vertex.clamp(a, c), lengths[best])
    return torch.where(best == 0, 0.0, vertex)
