"""K/V heads with longer keys get more query heads, by every batch anew (KDGQA, 2408.08454).

n_g is the norm of the keys of K/V head g; r_g = (n_g − min n) / (max n − min n), and of the H query heads, in their order, head g
gets a run of a_g ~ H · r_g / Σr.

Repaired (default): every head keeps one query and the other H − G go by r, by largest remainders; equal norms share evenly. n_g is
a mean over samples of the root mean square of a key, so neither length nor padding counts. In training a batch cuts for itself
while its norms enter a running mean, as in a batch norm; outside, the cut is that mean's, the same for every batch and step of
decoding: what `freeze` fixes.

`published=true`: n_g is the Frobenius norm over positions, padding too, and dims, summed over the batch, in training and outside,
so an answer depends on the batch it is in and, when decoding, on the step. a_g is rounded, halves to the even number; while the sum
is too large the first largest loses one, while it is too small the first smallest wins one. The head with the shortest keys has
r = 0, and a head may be left without a query, its K and V unused (it cannot be written then). Equal norms, 0/0 there, are refused.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from ...core.methods import RouteMethod
from ...core.routes import Norms, RouteState, apportion, rounded, spread


def route(state: RouteState, norms: Norms, training: bool, *, published: bool = False, seed: int = 0) -> RouteState:
    """One forward pass: the sizes for it, and in training the mean with its norms in it."""
    lengths = norms.whole if published else norms.per_token
    seen = state.measured(lengths) if training else state
    if published:
        return replace(seen, sizes=published_sizes(lengths.sum(0), state.num_heads))
    return replace(seen, sizes=apportion(spread(lengths.mean(0)), state.num_heads)) if training else settle(state)


def settle(state: RouteState, *, published: bool = False) -> RouteState:
    """The sizes that all norms measured so far call for; as they are where there are none."""
    if state.count == 0:
        return state
    cut = published_sizes(state.mean, state.num_heads) if published else apportion(spread(state.mean), state.num_heads)
    return replace(state, sizes=cut)


def published_sizes(norms: Float[Tensor, " group"], num_heads: int) -> tuple[int, ...]:
    """a of 2408.08454 with its corrections; the sum is `num_heads`, groups may be empty."""
    sizes = rounded("kdgqa:published=true", spread(norms), num_heads)
    while sum(sizes) > num_heads:
        sizes[sizes.index(max(sizes))] -= 1
    while sum(sizes) < num_heads:
        sizes[sizes.index(min(sizes))] += 1
    return tuple(sizes)


ROUTE = RouteMethod(route=route, settle=settle, published_depends_on_batch=True)
