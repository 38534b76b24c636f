"""Choose the dims of the rotary key and the base of its frequencies by the predicted error, on a few sites."""

from collections.abc import Mapping

from ..conversion.source import Source
from ..core.errors import UserError
from ..core.stats import SiteStats
from ..families.layout import read_heads
from ..hf_models.building import open_config
from .fit import fit
from .moments import SiteMoments, site_moments
from .request import KERNEL_ROTARY_DIM, LatentRequest
from .target import Shape

STRIDES = (1.0, 0.5)
"""Planes of the original from one plane of the rotary key to the next: with 1 they are its fastest planes, with ½ there is one more
between each two."""
NUM_SITES = 4
ROUNDS = 12
"""Rounds of the fit that tell shapes apart."""
SHARES = (1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2)
"""Shares of the cached numbers that the rotary key may have."""
PARTS = (8, 4, 2, 1)
"""Parts of twice the head_dim, the largest rotary key, that it may have as well."""


def possible_shapes(source: Source, request: LatentRequest) -> list[Shape]:
    """Return the shapes that the request allows. A latent of a given size gets a rotary key of `KERNEL_ROTARY_DIM` dims, or of the head_dim
    where that is smaller.

    Raises:
        UserError: a rotary key with more planes than there are frequencies for, a share that is too small, or sizes that save nothing.
    """
    cached, site = request.cached(source), source.sites[0]
    if cached is None:
        assert request.rank is not None
        dims = [(request.rank, request.rotary_dim or min(KERNEL_ROTARY_DIM, site.head_dim))]
    elif request.rotary_dim is not None:
        dims = [(cached - request.rotary_dim, request.rotary_dim)]
    else:
        most = 2 * site.head_dim
        sizes = {max(2, 2 * round(min(cached * share, most) / 2)) for share in SHARES}
        sizes |= {max(2, most // part // 2 * 2) for part in PARTS}
        dims = [(cached - size, size) for size in sorted(sizes) if size <= cached - 2]
    whole = 2 * site.num_kv_heads * site.head_dim
    if sum(dims[0]) >= whole:
        raise UserError(
            f"fold --to mla: --kv-rank: expected fewer than the {whole} numbers of the original, got {dims[0][0]} and a rotary key "
            f"of {dims[0][1]}; choose fewer"
        )
    shapes = [_shape(source, *each, stride) for each in dims for stride in STRIDES if each[1] <= site.head_dim / stride]
    if not shapes:
        raise UserError(
            f"fold --to mla: --rope-dim: expected at most {2 * site.head_dim}, twice the head_dim, got {request.rotary_dim}"
        )
    return shapes


def choose_shape(source: Source, shapes: list[Shape], stats: Mapping[str, SiteStats]) -> Shape:
    """Return the shape with the least predicted error."""
    if len(shapes) == 1:
        return shapes[0]
    some = source.sites[:: max(1, len(source.sites) // NUM_SITES)][:NUM_SITES]
    moments = [site_moments(read_heads(each, source.read_finite), stats[each.name]) for each in some]
    return min(shapes, key=lambda shape: predicted_error(moments, shape))


def predicted_error(moments: list[SiteMoments], shape: Shape) -> float:
    """Return the sum over sites of the error after a few rounds, as shares of their energy."""
    return sum(fit(each, shape.rank, shape.turns, ROUNDS).error for each in moments)


def _shape(source: Source, rank: int, rotary_dim: int, stride: float) -> Shape:
    """Return a shape whose planes lie `stride` planes of the original apart, beginning at the fastest."""
    head_dim = source.sites[0].head_dim
    opened = open_config(source.config, f"{source.name}/config.json")
    base = float(opened.rope_parameters["rope_theta"]) ** (stride * rotary_dim / head_dim)
    return Shape(rank, rotary_dim, base, head_dim, head_dim)
