"""Give K/V heads with longer keys more query heads, anew for every batch (KDGQA, 2408.08454).

n_g is the norm of the keys of K/V head g; r_g = (n_g − min n) / (max n − min n), and head g gets a run of a_g ~ H · r_g / Σr of
the H query heads, in their order.

Repaired (default): every head keeps one query head and the other H − G are apportioned by r, by largest remainders; equal norms
give equal sizes. n_g is a mean over samples of the root mean square of a key, so neither length nor padding changes it. In
training, each batch decides its own groups while its norms enter a running mean, as in batch normalisation. Outside training the
groups are those of that mean, the same for every batch and decoding step; `freeze` fixes them.

`published=true`: n_g is the Frobenius norm over positions, padding included, and dims, summed over the batch, in training and
outside, so an output depends on its batch and, in decoding, on the step. a_g is rounded, halves to the even number; while the sum
is too large the first largest loses one, while it is too small the first smallest gains one. The head with the shortest keys has
r = 0, and a head may be left without a query head, its K and V unused (it cannot be written to disk then). Equal norms, for which
r is 0/0, are refused.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from ...core.methods import RouteMethod
from ...core.routes import Norms, RouteState, apportion, min_max, published_rounding


def route(state: RouteState, norms: Norms, training: bool, *, published: bool = False, seed: int = 0) -> RouteState:
    """Return the state of one forward pass: its sizes and, in training, its norms in the running mean."""
    lengths = norms.whole if published else norms.per_token
    seen = state.with_samples(lengths) if training else state
    if published:
        return replace(seen, sizes=published_sizes(lengths.sum(0), state.num_heads))
    return replace(seen, sizes=apportion(min_max(lengths.mean(0)), state.num_heads)) if training else settle(state)


def settle(state: RouteState, *, published: bool = False) -> RouteState:
    """Return the state with the sizes given by all norms measured so far; unchanged if there are none."""
    if state.count == 0:
        return state
    cut = published_sizes(state.mean, state.num_heads) if published else apportion(min_max(state.mean), state.num_heads)
    return replace(state, sizes=cut)


def published_sizes(norms: Float[Tensor, " group"], num_heads: int) -> tuple[int, ...]:
    """Return the sizes a of 2408.08454 with its corrections: they sum to `num_heads`, and groups may be empty."""
    sizes = published_rounding("kdgqa:published=true", min_max(norms), num_heads)
    while sum(sizes) > num_heads:
        sizes[sizes.index(max(sizes))] -= 1
    while sum(sizes) < num_heads:
        sizes[sizes.index(min(sizes))] += 1
    return tuple(sizes)


ROUTE = RouteMethod(route=route, settle=settle, published_depends_on_batch=True)
