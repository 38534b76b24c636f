"""Random attention sites without a model: heads of every kind, the tokens they see, and errors computed one by one."""

from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from jaxtyping import Float
from reference_attention import project
from torch import Generator, Tensor

from headfold.core.equivalents import key_transform
from headfold.core.groups import Groups
from headfold.core.heads import Heads, KeyFreedom
from headfold.core.predict import SiteError
from headfold.core.stats import SiteStats
from headfold.measure import second_moment

FREEDOMS = {
    "no position": KeyFreedom("any"),
    "halves": KeyFreedom("rope-halves", 6),
    "pairs": KeyFreedom("rope-pairs", 6, True),
    "partial halves": KeyFreedom("rope-halves", 4),
    "partial pairs": KeyFreedom("rope-pairs", 2, True),
    "normed": KeyFreedom("signs", 6),
    "normed pairs": KeyFreedom("signs", 6, True),
    "normed together": KeyFreedom("signs", 6, norm_spans_heads=True),
}
DIM = 6
"""Dims of a K head; V heads have fewer, so that nothing takes one for the other."""
VALUE_DIM = 5
MODEL = 23
"""More than three heads' dims and no multiple of them: heads drawn at random share no directions."""


@dataclass(frozen=True, slots=True)
class RandomSite:
    """Heads and the tokens from which their statistics come."""

    heads: Heads = field(repr=False)
    x: Float[Tensor, "sequence token model"] = field(repr=False)
    drawn: str
    """How it was drawn, for the reports of failed laws."""

    @property
    def stats(self) -> SiteStats:
        return SiteStats(second_moment.observe(self.x), self.x.shape[0] * self.x.shape[1])


def random_site(
    freedom: str = "halves", num_kv_heads: int = 4, queries: int = 1, *, bias: bool = True, seed: int = 0
) -> RandomSite:
    """`queries` query heads per K/V head. With `bias`, all four projections have one; K/V heads differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def rows(num: int, dim: int) -> Tensor:
        drawn = draw(num, dim, MODEL + 1) * draw(num, 1, 1).exp() / MODEL**0.5
        drawn[..., -1] *= float(bias)
        return drawn

    normed, together = FREEDOMS[freedom].normed, FREEDOMS[freedom].norm_spans_heads
    num_heads = num_kv_heads * queries
    heads = Heads(
        q=rows(num_heads, DIM),
        k=rows(num_kv_heads, DIM),
        v=rows(num_kv_heads, VALUE_DIM),
        o=draw(num_heads, VALUE_DIM, MODEL),
        groups=Groups.contiguous(num_heads, num_kv_heads),
        key_freedom=FREEDOMS[freedom],
        o_bias=draw(MODEL) if bias else None,
        q_gain=1 + 0.3 * draw(*([num_heads] if together else []), DIM).tanh() if normed else None,
        k_gain=1 + 0.3 * draw(*([num_kv_heads] if together else []), DIM).tanh() if normed else None,
    )
    mixing = draw(MODEL, MODEL) / MODEL**0.5
    # A mean of its own for every sequence: centring per sequence is then not centring over all.
    x = draw(3, 12, MODEL) @ mixing + draw(3, 1, MODEL) + 0.5
    return RandomSite(heads, x, f"{freedom}, {num_kv_heads} groups of {queries}, bias={bias}, seed={seed}")


@st.composite
def cases(draw: st.DrawFn) -> tuple[RandomSite, Groups]:
    """A site of any kind and a partition of its K/V heads into equal groups."""
    num_kv_heads, num_shared = draw(
        st.sampled_from([(h, g) for h in (1, 2, 3, 4, 6) for g in range(1, h + 1) if h % g == 0])
    )
    site = random_site(
        draw(st.sampled_from(sorted(FREEDOMS))),
        num_kv_heads,
        draw(st.sampled_from([1, 2])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )
    order = draw(st.permutations(range(num_kv_heads)))
    size = num_kv_heads // num_shared
    return site, Groups.from_members([sorted(order[at : at + size]) for at in range(0, num_kv_heads, size)])


def planted(heads: Heads) -> Groups:
    """Which K/V heads are copies of one, seen from V alone: copies have the same row space, however they are transformed."""
    spaces = [torch.linalg.qr(v.T)[0] for v in heads.v.double()]
    nearest = [[float((a.T @ b).square().sum()) > len(a.T) - 1e-6 for b in spaces] for a in spaces]
    return Groups.of([row.index(True) for row in nearest])


def rotated_copies(heads: Heads, num_copies: int, seed: int) -> Heads:
    """Every K/V head `num_copies` times, each turned by a rotation (under q/k-norm: signs) that attention does not see."""
    generator = torch.Generator().manual_seed(seed)
    heads = heads.expand(heads.num_kv_heads * num_copies)
    turn_k = torch.stack(
        [_polar(key_transform(heads.key_freedom, heads.head_dim, generator)[0]) for _ in range(heads.num_kv_heads)]
    )
    turn_v = torch.stack([_polar(_square(heads.v.shape[1], generator)) for _ in range(heads.num_kv_heads)])
    reads = torch.tensor(heads.groups.group_of_head)
    return replace(heads, q=turn_k[reads] @ heads.q, k=turn_k @ heads.k, v=turn_v @ heads.v, o=turn_v[reads] @ heads.o)


def _square(dim: int, generator: Generator) -> Tensor:
    return torch.randn(dim, dim, dtype=torch.float64, generator=generator)


def _polar(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """The orthogonal factor."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def realised_error(before: Heads, after: Heads, x: Float[Tensor, "sequence token model"]) -> SiteError:
    """What the query heads of `after` miss of `before`, over every query token beside every key token.

    `key` is in logit², the phase between query and key averaged over all angles in each rotating plane, components without position
    centred per sequence. Under q/k-norm the norms are held at their root mean square, and every query head, whose scale a norm removes,
    is taken at the best one. `value` is in output², less its mean where an output bias takes that.
    """
    key = sum(
        _group_key_error(before, after, x, [h for h in range(after.num_heads) if after.groups.group_of_head[h] == g])
        for g in range(after.num_kv_heads)
    )
    value = sum(_value_error(before, after, x, h) for h in range(after.num_heads))
    return SiteError(float(key), float(value))


def _group_key_error(before: Heads, after: Heads, x: Tensor, queries: list[int]) -> Tensor:
    old, new = (torch.stack([_scores(heads, x, h) for h in queries]) for heads in (before, after))
    every = tuple(range(1, new.ndim))
    scale = (old * new).sum(every, True) / new.square().sum(every, True) if before.key_freedom.normed else 1.0
    return (old - scale * new).square().sum() / (x.shape[0] * x.shape[1]) ** 2


def _scores(heads: Heads, x: Tensor, query: int) -> Float[Tensor, "part query_token key_token"]:
    """The parts of every logit whose squares add up once phases are averaged: two per rotating plane, one for the rest."""
    rotary = heads.key_freedom.rotary_dim
    q = project(heads.q[query], x.flatten(0, 1))
    k = project(heads.k[heads.groups.group_of_head[query]], x.flatten(0, 1))
    if heads.key_freedom.normed:
        q, k = (
            one / _length(every, head, x, heads) * (gain if gain.ndim == 1 else gain[head])
            for one, every, gain, head in (
                (q, heads.q, heads.q_gain, query),
                (k, heads.k, heads.k_gain, heads.groups.group_of_head[query]),
            )
        )
    parts = []
    for a, b in plane_dims(heads.key_freedom):
        zq, zk = torch.complex(q[:, a], q[:, b]), torch.complex(k[:, a], k[:, b])
        product = torch.outer(zq.conj(), zk) / 2**0.5  # E over θ of Re(e^{iθ} z)² is |z|² / 2
        parts += [product.real, product.imag]
    if rotary < heads.head_dim:
        rest = k[:, rotary:].unflatten(0, x.shape[:2])
        parts.append(q[:, rotary:] @ (rest - rest.mean(1, keepdim=True)).flatten(0, 1).T)
    return torch.stack(parts)


def _length(rows: Tensor, head: int, x: Tensor, heads: Heads) -> Tensor:
    """Root mean square over tokens and dims, of one head or of all."""
    counted = rows if heads.key_freedom.norm_spans_heads else rows[[head]]
    return torch.stack([project(each, x.flatten(0, 1)) for each in counted]).square().mean().sqrt()


def plane_dims(freedom: KeyFreedom) -> list[tuple[int, int]]:
    """The two dims of every frequency plane, spelled out."""
    half = freedom.rotary_dim // 2
    return [(2 * f, 2 * f + 1) if freedom.interleaved else (f, f + half) for f in range(half)]


def _value_error(before: Heads, after: Heads, x: Tensor, query: int) -> Tensor:
    old, new = (
        project(heads.v[heads.groups.group_of_head[query]], x.flatten(0, 1)) @ heads.o[query]
        for heads in (before, after)
    )
    missing = old - new
    return (missing - missing.mean(0) if before.o_bias is not None else missing).square().sum(1).mean()
