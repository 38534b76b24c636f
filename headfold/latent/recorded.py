"""The recorded calls of one site, replayed with a latent: what the fits of `headfold.refine` ask of a site."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.groups import Groups
from ..core.heads import Heads, KeyFreedom
from ..families.spec import Site
from ..refine.recorded import AttentionInputs, RecordedSite, Replay
from .attention import attended_values, queries_and_keys
from .rotation import rotated
from .site import Latent


def as_heads(site: Latent) -> Heads:
    """Return the site as heads whose values are functions of the latent, in a space of its own: `v` takes latents, and `k`, which
    depends on latents and inputs, is left empty. The dims that rotate come first.
    """
    heads, size = site.q.shape[:2]
    bias = site.q.new_zeros(heads, 1, 1)
    return Heads(
        q=torch.cat([_moved(site.q, -site.rotary_dim), bias.expand(-1, size, -1)], 2),
        k=site.q.new_zeros(heads, size, site.rank + 1),
        v=torch.cat([site.up_v, bias.expand(-1, site.up_v.shape[1], -1)], 2),
        o=site.o,
        groups=Groups(tuple(range(heads))),
        key_freedom=KeyFreedom("rope-pairs", site.rotary_dim, True),
    )


def with_heads(site: Latent, heads: Heads) -> Latent:
    """Return the site with the queries, values and outputs of heads that `as_heads` gave and a fit changed."""
    q = _moved(heads.q[..., :-1], site.rotary_dim)
    return Latent(q, site.down, site.rotary, site.up_k, heads.v[..., :-1], heads.o)


def _moved(rows: Float[Tensor, "head dim model"], first: int) -> Float[Tensor, "head dim model"]:
    """Return rows that begin at another one."""
    return torch.cat([rows[:, first:], rows[:, :first]], 1)


class RecordedLatent(RecordedSite):
    """One site of the original with the inputs and outputs of its recorded calls, which are packed text from position zero."""

    def __init__(
        self,
        site: Site,
        original: Heads,
        latent: Latent,
        turns: Float[Tensor, " plane"],
        inputs: Sequence[Float[Tensor, "batch token model"]],
        outputs: Sequence[Float[Tensor, "batch token model"]],
    ) -> None:
        self.site, self.numbers, self.all_numbers = site, range(len(inputs)), range(len(inputs))
        self.order = torch.arange(site.num_heads)
        self._given, self._outputs, self._latent, self._turns = inputs, outputs, latent, turns
        freedom = original.key_freedom
        planes = freedom.planes().flatten()
        self._own_turns = torch.tensor(freedom.frequencies, dtype=torch.float64)
        self._own = tuple(rows[:, planes, :-1].to(latent.q) for rows in (original.q, original.k))

    @property
    def catches_attention(self) -> bool:
        return True

    def num_queries(self, number: int) -> int:
        return self._given[number].shape[:2].numel()

    def target(self, number: int) -> Float[Tensor, "position model"]:
        return self._outputs[number].flatten(0, 1).to(self._latent.o)

    def attention_inputs(self, heads: Heads | None, number: int) -> AttentionInputs:
        inputs = self._given[number].to(self._latent.q)
        if heads is None:
            q, k = (torch.einsum("btm,hdm->bhtd", inputs, rows) for rows in self._own)
            query, key = (rotated(rows, self._own_turns) for rows in (q, k))
            # The fit has one softmax scale for both.
            size = self._latent.q.shape[1]
            return AttentionInputs(query * (size / query.shape[-1]) ** 0.5, key, None, size**-0.5, True, inputs, None)
        query, key = queries_and_keys(with_heads(self._latent, heads), self._turns, inputs)
        rotary = self._latent.rotary_dim
        query, key = (torch.cat([x[..., -rotary:], x[..., :-rotary]], -1) for x in (query, key))
        return AttentionInputs(query, key, None, query.shape[-1] ** -0.5, True, inputs, None)

    def run(self, heads: Heads, number: int) -> Replay:
        inputs = self._given[number].to(self._latent.q)
        mixed = attended_values(with_heads(self._latent, heads), self._turns, inputs)
        rows = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        latents = inputs @ self._latent.down.T
        return Replay(
            rows, rows @ heads.o.flatten(0, 1), self.target(number), inputs.flatten(0, 1), latents.flatten(0, 1)
        )

    def output_inputs(self, heads: Heads, number: int) -> Float[Tensor, "position head_times_dim"]:
        return self.run(heads, number).inputs
