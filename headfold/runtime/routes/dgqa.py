"""Give K/V heads whose keys are long, or grow fast, more query heads, once per window of steps (DGQA, 2408.08454).

With n_g the norm of the keys of K/V head g and c_g what the last change of the groups kept of it, shares are ρ_g = 0.9 n_g + 0.1
c_g, or |c_g − n_g| with `difference=true`. Head g gets a run of about H · ρ_g / Σρ of the H query heads, in their order.

Repaired (default): n_g is the mean over the window's samples of the root mean square of a key, without padding. At the end of
every `window` training steps, and of the samples measured by `freeze`, every head gets one query head and the other H − G are
apportioned by ρ, by largest remainders (equally if no norm has changed). Then c = ρ, a true moving average, or c = n for
differences. c starts at 0, so the first change is by n. Outside training nothing changes: an output depends on no other item of
its batch.

`published=true`: n_g is the Frobenius norm over positions, padding included, and dims, summed over one batch. In training only
steps 0, window, 2 · window … count (`routing.new_epoch` is the published restart): a = H · ρ / Σρ is rounded, halves to
the even number, and while the sum is wrong a head drawn at random (`seed`) gains or loses one, none below 0. Then c ← (c + n) /
window, which leaves c so small that both kinds of shares reduce to n, and the sizes are nearly equal. Outside training the groups
are recomputed for every batch and c ← n, so an output depends on its batch, on the previous one and on random numbers; the same
batch twice is 0/0 for differences, which is refused here.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from ...core.methods import RouteMethod
from ...core.routes import Norms, RouteState, apportion, published_rounding

NEW = 0.9
"""Weight of the new norms in their moving average, as published."""


def route(
    state: RouteState,
    norms: Norms,
    training: bool,
    *,
    published: bool = False,
    difference: bool = False,
    window: int = 300,
    seed: int = 0,
) -> RouteState:
    """Return the state of one forward pass. `window` is in training steps."""
    if published:
        return _published(state, norms.whole.sum(0), training, difference, window, seed)
    if not training:
        return state
    state = replace(state.with_samples(norms.per_token), step=state.step + 1)
    return state if state.step % window else settle(state, difference=difference)


def settle(state: RouteState, *, published: bool = False, difference: bool = False, window: int = 300) -> RouteState:
    """Return the state with the window closed now, however short it is; the published form keeps its last groups."""
    if published or state.count == 0:
        return state
    found = shares(state.kept, state.mean, difference)
    sizes = apportion(found.tolist(), state.num_heads)
    kept = state.mean if difference else found
    return replace(state, sizes=sizes, kept=kept, mean=0 * state.mean, count=0)


def shares(kept: Float[Tensor, " group"], norms: Float[Tensor, " group"], difference: bool) -> Float[Tensor, " group"]:
    """Return ρ."""
    return (kept - norms).abs() if difference else NEW * norms + (1 - NEW) * kept


def _published(
    state: RouteState, norms: Float[Tensor, " group"], training: bool, difference: bool, window: int, seed: int
) -> RouteState:
    if training and state.step % window:
        return replace(state, step=state.step + 1)
    norms = norms.to(state.kept)
    found = published_rounding("dgqa:published=true", shares(state.kept, norms, difference).tolist(), state.num_heads)
    sizes = corrected(found, state.num_heads, random.Random(f"{seed} {state.draws}"))
    kept = (state.kept + norms) / window if training else norms
    return replace(state, sizes=sizes, kept=kept, step=state.step + training, draws=state.draws + 1)


def corrected(sizes: Sequence[int], num_heads: int, draw: random.Random) -> tuple[int, ...]:
    """Add one to, or take one from, groups drawn at random until the sum is right."""
    sizes = list(sizes)
    while (wrong := num_heads - sum(sizes)) != 0:
        group = draw.randrange(len(sizes))
        sizes[group] += 1 if wrong > 0 else -(sizes[group] > 0)
    return tuple(sizes)


ROUTE = RouteMethod(route=route, settle=settle, published_depends_on_batch=True)
