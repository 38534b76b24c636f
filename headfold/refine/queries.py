"""Refits W_q of every query head to the attention of the original, with the shared keys fixed.

Minimises the cross-entropy between the original's attention p and the fold's p̂, Σ_t −Σ_s p_ts log p̂_ts, over W_q. With keys fixed it is
convex, a logistic regression per head; a merge fits the logits by least squares instead, in which a key that nobody attends to counts as
much as one that everybody does. One Newton step: conjugate gradients (Hestenes & Stiefel 1952) on the curvature, its covariances of keys
taken under (p + p̂) / 2, since under p̂ alone a key that p̂ has lost does not count; preconditioned by its Kronecker factorisation
(Martens & Grosse 2015, 1503.05671). Then a search along the step, on queries that the step was not fitted to, so that no head gets worse.

Queries are a sample, since attention is smooth in them; all keys are seen. Under norms of queries the step is that of Gauss and Newton
(`sampled.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil, floor

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from ..core.heads import Heads
from ..core.products import self_product
from ..core.query_sample import num_sampled_queries
from ..core.stats import NARROW
from ..descent.kronecker import Rows, damped, inverse
from ..parallel import all_reduce
from .recorded import AttentionInputs, RecordedSite
from .sampled import Logits, Normed, Queries, QueryMap, Sampled, logits, projected, weighted

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


def has_data(site_calls: RecordedSite, heads: Heads) -> bool:
    """Return whether there are queries enough for W_q; fitted to fewer, it follows the words of the calibration data."""
    return site_calls.total_queries(heads.q.device) >= NARROW * (heads.q.shape[2] - 1)


@torch.no_grad()
def refit_queries(site_calls: RecordedSite, heads: Heads, ridge: float, steps: int) -> Heads | None:
    """Return the heads with another `q`; its bias column stays as it is where the site has none.

    None where that cannot be done: the class does not pass its queries to transformers' attention, or they are not what position and norm
    make of W_q x.
    """
    if not site_calls.catches_attention:
        return None
    size = heads.q.shape[2] if {"q", "qkv"} & set(site_calls.site.biases) else heads.q.shape[2] - 1
    start = heads.q[..., :size]
    order = site_calls.order.to(start.device)
    moves = bool((order != torch.arange(len(order), device=order.device)).any())
    attention = QueryMap(heads.key_freedom, _gain(heads), order if moves else None)
    slope, curvature, search = _samples(site_calls, heads, size)
    if any(_total(len(some), start.device) == 0 for some in (slope, curvature, search)):
        return None  # all calls are too short to leave queries out
    if not _are_known(attention, heads, search):
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
    change *= _lengths(attention, search, heads, change)[:, None, None]
    return replace(heads, q=torch.cat([start + change, heads.q[..., size:]], 2))


def _gain(heads: Heads) -> Float[Tensor, "*#head 1 dim"] | None:
    """Return the gain of the norm of queries, which broadcasts to (batch, head, query, dim)."""
    gain = heads.gain("q")
    return None if gain is None else gain.unsqueeze(-2)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where nothing is left to gain."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _samples(site_calls: RecordedSite, heads: Heads, size: int) -> tuple[list[Sampled], list[Sampled], list[Sampled]]:
    """Return the queries of the gradient, of the curvature and of the search. No query of the first two is one of the last."""
    total = site_calls.total_queries(heads.q.device)
    wanted = num_sampled_queries(total, size)
    found: tuple[list[Sampled], list[Sampled], list[Sampled]] = ([], [], [])
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
) -> Iterator[Sampled]:
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
        z = torch.einsum("bts,hds->bhtd", inputs.to(heads.q.dtype), heads.q)
        yield Sampled(
            inputs[..., :size], *_moved(z, query, heads), query, mine.key[:, :, :last], theirs.query[:, :, some],
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
    z: Queries, query: Queries, heads: Heads
) -> tuple[Complex[Tensor, "batch query plane"] | None, Float[Tensor, ""], Normed | None]:
    """Return by what the module multiplied every frequency plane of W_q x = `z`, and the other dims, and what its norm did before."""
    normed = None
    if heads.key_freedom.normed:
        together = heads.key_freedom.norm_spans_heads
        length = z.square().mean((1, 3), keepdim=True).clamp_min(torch.finfo(z.dtype).tiny).sqrt() if together else None
        normed = Normed.of(z, length)
        gain = _gain(heads)
        z = normed.unit if gain is None else normed.unit * gain.to(z)
    step = ceil(len(heads.q) / _MOVED_HEADS)
    before, after = z[:, ::step], query[:, ::step].to(z.dtype)  # what position does is the same for all heads
    tiny, turn = torch.finfo(before.dtype).tiny, None
    if heads.key_freedom.rotary_dim:
        planes = heads.key_freedom.planes().to(query.device)
        first, turned = (torch.complex(x[..., planes[:, 0]], x[..., planes[:, 1]]) for x in (before, after))
        turn = (turned * first.conj()).sum(1) / first.abs().square().sum(1).clamp_min(tiny)
    rest = slice(heads.key_freedom.rotary_dim, None)
    factor = (before[..., rest] * after[..., rest]).sum() / before[..., rest].square().sum().clamp_min(tiny)
    return turn, factor, normed


def _before(heads: Heads, at: Sampled) -> Queries:
    """Return W_q x with its bias."""
    constant = heads.q[:, None, :, -1] if at.inputs.shape[2] < heads.q.shape[2] else 0
    return projected(heads.q[..., : at.inputs.shape[2]], at) + constant


def _are_known(attention: QueryMap, heads: Heads, samples: Sequence[Sampled]) -> bool:
    """Return whether the queries that `attention` computes are those of the module."""
    sums = torch.zeros(2, dtype=torch.float64, device=heads.q.device)
    for at in samples:
        query = at.query.to(heads.q.dtype)
        sums[0] += (attention.queries(_before(heads, at), at) - query).square().sum()
        sums[1] += query.square().sum()
    missing, energy = all_reduce(sums).tolist()
    return missing <= _LINEAR**2 * energy


def _slope(attention: QueryMap, samples: Sequence[Sampled], rows: Rows) -> Rows:
    """Return the gradient of the cross-entropy at the folded heads, from which the queries were taken."""
    total = torch.zeros_like(rows)
    for at in samples:
        rest = logits(at.query, at.key, at.scaling, at.hidden).softmax(-1).sub_(attention.target(at))
        total += _summed(attention.pulled(weighted(rest, at.key), at), at)
    return all_reduce(total)


def _summed(gradient: Queries, at: Sampled) -> Rows:
    return torch.einsum("bhtd,bts->hds", gradient, at.inputs.to(gradient.dtype))


class _Mixtures:
    """(p + p̂) / 2 of samples, kept from the first time on as far as there is room."""

    def __init__(self, attention: QueryMap, samples: Sequence[Sampled]) -> None:
        self.attention, self.samples = attention, samples
        self._kept: dict[int, Logits] = {}
        self._left = _KEPT

    def __iter__(self) -> Iterator[tuple[Sampled, Logits]]:
        for number, at in enumerate(self.samples):
            weights = self._kept.get(number)
            if weights is None:
                weights = (
                    logits(at.query, at.key, at.scaling, at.hidden).softmax(-1).add_(self.attention.target(at)).div_(2)
                )
                if weights.numel() <= self._left:
                    self._kept[number] = weights
                    self._left -= weights.numel()
            yield at, weights


def _curvature(mixtures: _Mixtures, direction: Rows) -> Rows:
    """Return the curvature times a direction."""
    total, attention = torch.zeros_like(direction), mixtures.attention
    for at, weights in mixtures:
        moved = logits(attention.moved(direction, at), at.key, at.scaling)
        spread = moved.sub_((weights * moved).sum(-1, keepdim=True)).mul_(weights)
        total += _summed(attention.pulled(weighted(spread, at.key), at), at)
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
        pulled = attention.pulled(drawn - weighted(weights, at.key), at)
        left += torch.einsum("bhtd,bhte->hde", pulled, pulled)
        x = at.inputs.to(rows.dtype)
        x = (x if at.counted is None else x * at.counted[..., None]).flatten(0, 1)
        right += self_product(x)
    left = all_reduce(left) / _num_queries(mixtures.samples, device)
    return damped(left, _DAMPING), damped(all_reduce(right), damping)


def _num_queries(samples: Sequence[Sampled], device: torch.device) -> float:
    """Return the number of sampled queries over all ranks, at least 1."""
    own = sum(at.inputs.shape[:2].numel() if at.counted is None else int(at.counted.sum()) for at in samples)
    return max(1.0, _total(own, device))


def _lengths(attention: QueryMap, samples: Sequence[Sampled], heads: Heads, step: Rows) -> Float[Tensor, " head"]:
    """Return by head the length of the step that brings the cross-entropy to its least, 0 among them."""
    losses = torch.zeros(len(_LENGTHS), len(step), dtype=torch.float64, device=step.device)
    for at in samples:
        counts = 1.0 if at.counted is None else at.counted[:, None]
        found = _linear_losses(attention, at, step) if at.normed is None else _normed_losses(attention, at, heads, step)
        for number, loss in enumerate(found):
            losses[number] += (loss * counts).sum((0, 2))
    return _least(all_reduce(losses), torch.tensor(_LENGTHS, dtype=torch.float64, device=step.device)).to(step.dtype)


def _linear_losses(attention: QueryMap, at: Sampled, step: Rows) -> Iterator[Float[Tensor, "batch head query"]]:
    """Yield the cross-entropy at each length of the step, whose logits are linear in it."""
    target = attention.target(at)
    here = logits(at.query, at.key, at.scaling, at.hidden)
    moved = logits(attention.moved(step, at), at.key, at.scaling)
    linear = torch.stack([(target * part).sum(-1) for part in (here, moved)])
    for length in _LENGTHS:
        yield (here + length * moved).logsumexp(-1) - linear[0] - length * linear[1]


def _normed_losses(
    attention: QueryMap, at: Sampled, heads: Heads, step: Rows
) -> Iterator[Float[Tensor, "batch head query"]]:
    """Yield the same under norms."""
    target, before, along = attention.target(at), _before(heads, at), projected(step, at)
    for length in _LENGTHS:
        there = logits(attention.queries(before + length * along, at), at.key, at.scaling, at.hidden)
        yield there.logsumexp(-1) - (target * there).sum(-1)


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
