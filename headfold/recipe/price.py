"""What attention costs to serve: cache, weights and arithmetic, of a checkpoint as it is and as a plan folds it."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..core.plan import Plan
from ..corpus.samples import kind_of
from ..export.layout import choose_layout, query_heads
from ..families.layout import planned_shapes
from .config import config_of
from .source import Source, open_source

CONTEXT = 2048
"""Tokens of the prompt that `flops_per_token` is for."""


@dataclass(frozen=True, slots=True)
class ServingCost:
    """Of all attention sites together. Wide heads buy a better cache with the last two."""

    head_dims: str
    """Width of a cached K/V head, a range where sites differ."""
    kv_bytes_per_token: int
    weight_bytes: int
    """Of W_q, W_k, W_v and W_o."""
    flops_per_token: int
    """Of projections and attention, per token of a prompt of `CONTEXT` tokens, causal where it may be."""


def price(source: Source, plan: Plan | None = None, layout: str | None = None) -> ServingCost:
    """The price of the source, or of what `plan` makes of it in the `layout` asked for, with the zero heads that fill groups up."""
    written = _query_heads(source, plan, layout) if plan else {}
    shape_of = {name: info.shape for name, info in source.checkpoint.tensors.items()}.__getitem__
    dims, elements, products, cached = set(), 0, 0, source.cached_sites
    generates = kind_of(source.checkpoint.config) in ("text", "pairs", "audio")
    for site in source.every_site:
        planned = plan.sites.get(site.name) if plan else None
        num_kv_heads = planned.groups.num_kv_heads if planned else site.num_kv_heads
        width = planned.head_dim if planned else site.head_dim
        shapes = planned_shapes(site, num_kv_heads, shape_of, width // site.head_dim)
        num_heads = written.get(site.name, site.num_heads)
        elements += sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
        per_head = prod(shapes[f"{site.weights['o']}.weight"]) // site.num_heads  # as large in W_q
        elements += 2 * per_head * (num_heads - site.num_heads)
        # QKᵀ and PV each: a causal query sees half of the context in the mean, any other the whole.
        products += num_heads * width * CONTEXT * (1 if generates and not (site.reads_encoder or site.optional) else 2)
        if site in cached:
            dims.add(width)
    said = str(min(dims)) if len(dims) == 1 else f"{min(dims)} to {max(dims)}"
    return ServingCost(
        said, source.kv_bytes_per_token(plan), elements * source.dtype.itemsize, 2 * elements + 2 * products
    )


def _query_heads(source: Source, plan: Plan, layout: str | None) -> dict[str, int]:
    """By name, of the sites that are written with heads of their own; the others have the source's."""
    config = config_of(source, plan)
    written = query_heads(config, choose_layout(config, layout))
    return dict(zip((site.name for site in source.sites), written, strict=True)) if written else {}


def serving_costs(model: str | Path, plan: Plan, encoder: bool = False) -> tuple[ServingCost, ServingCost]:
    """Before and after `plan`.

    Raises:
        UserError: see `open_source`.
    """
    source = open_source(model, encoder)
    return price(source), price(source, plan)
