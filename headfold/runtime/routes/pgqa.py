"""Keep the model's own groups, and subtract noise from the output of attention (PGQA, 2408.08454).

The output of a sample and group is a matrix Y (head, position · dim). Noise is drawn from U(0, 1) in that shape, its diagonal set
to 0, each row brought to mean 0 and standard deviation 1 and then to those of the same row of Y, and subtracted. It carries no
gradient.

Repaired (default): only in training; scaled to `strength` times the row's standard deviation and with mean 0, so that Y is
unchanged in the mean. Outside training, and frozen, this is `static` for every batch.

`published=true`: outside training too, so an output depends on random numbers (`seed`) and on its place in the batch; and the
row's mean enters the noise, so every head's mean output is subtracted from itself. The paper describes Gaussian noise on
attention maps; its code draws uniform noise on outputs. Constant rows, for which this is 0/0, get no noise.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.methods import RouteMethod
from ...core.routes import Norms, RouteState


def route(
    state: RouteState,
    norms: Norms,
    training: bool,
    *,
    published: bool = False,
    strength: float = 1.0,
    seed: int = 0,
) -> RouteState:
    """Return the state with the groups unchanged, and a new draw of noise for every pass that has noise."""
    return replace(state, draws=state.draws + 1) if training or published else state


def perturb(
    output: Float[Tensor, "sample token head dim"],
    sizes: tuple[int, ...],
    training: bool,
    generator: torch.Generator,
    *,
    published: bool = False,
    strength: float = 1.0,
) -> Float[Tensor, "sample token head dim"]:
    """Return the output minus its noise; heads lie in runs of these sizes."""
    if not (training or published):
        return output
    by_head = output.transpose(1, 2)
    noises = [
        _noise(rows.detach().flatten(2), generator, published, strength) for rows in by_head.split(list(sizes), 1)
    ]
    return output - torch.cat(noises, 1).view_as(by_head).transpose(1, 2)


def _noise(
    rows: Float[Tensor, "sample head number"], generator: torch.Generator, published: bool, strength: float
) -> Float[Tensor, "sample head number"]:
    noise = torch.rand(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    torch.diagonal(noise, dim1=1, dim2=2).zero_()
    noise = noise - noise.mean(2, keepdim=True)
    noise = noise / noise.std(2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    scaled = noise * rows.std(2, keepdim=True)
    return scaled + rows.mean(2, keepdim=True) if published else strength * scaled


ROUTE = RouteMethod(route=route, perturb=perturb, published_depends_on_batch=True)
