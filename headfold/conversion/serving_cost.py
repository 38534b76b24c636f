"""The costs of serving attention: cache, weights and arithmetic, before and after a plan."""

from dataclasses import dataclass
from math import prod

from ..core.plan import Plan
from ..exports.layout import choose_layout, query_heads
from ..families.context import context_length
from ..families.layout import planned_shapes
from .folded_config import folded_config
from .source import Source

PROMPT_TOKENS = 2048
"""Length of the prompt that `ServingCost.flops_per_token` is for."""


@dataclass(frozen=True, slots=True)
class ServingCost:
    """The cost of all attention sites together. Larger head dims buy a better fold of the same cache with the last two."""

    head_dims: str
    """head_dim of the cached K/V heads; a range where sites differ."""
    kv_bytes_per_token: int
    """Bytes of K and V that a token leaves in the cache; of a model that generates nothing, those that it computes."""
    weight_bytes: int
    """Bytes of W_q, W_k, W_v and W_o."""
    flops_per_token: int
    """Arithmetic of projections and attention per token of a prompt of `PROMPT_TOKENS` tokens, causal where the site is."""
    caches: bool = True
    """Whether K and V are cached at all: the model generates token by token."""
    context: int | None = None
    """Tokens that the model takes at once; None where its config names no limit."""
    cache_bytes: int = 0
    """Bytes of the cache of one sequence of the whole context, of at most 32,768 tokens."""


def serving_cost(source: Source, plan: Plan | None = None, layout: str | None = None) -> ServingCost:
    """Return the cost of the source, or of what `plan` makes of it in `layout`, including the zero heads that fill up groups."""
    written = _query_heads(source, plan, layout) if plan else {}
    shape_of = {name: info.shape for name, info in source.checkpoint.tensors.items()}.__getitem__
    head_dims, elements, products, cached = set(), 0, 0, source.cached_sites
    for site in source.every_site:
        planned = plan.sites.get(site.name) if plan else None
        num_kv_heads = planned.groups.num_kv_heads if planned else site.num_kv_heads
        head_dim = planned.head_dim if planned else site.head_dim
        shapes = planned_shapes(site, num_kv_heads, shape_of, head_dim // site.head_dim)
        num_heads = written.get(site.name, site.num_heads)
        elements += sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
        per_head = prod(shapes[f"{site.weights['o']}.weight"]) // site.num_heads  # W_q has as many
        elements += 2 * per_head * (num_heads - site.num_heads)
        # QKᵀ and PV: a causal query sees half of the context on average, any other all of it.
        is_causal = source.caches and not (site.reads_encoder or site.optional)
        products += num_heads * head_dim * PROMPT_TOKENS * (1 if is_causal else 2)
        if site in cached:
            head_dims.add(head_dim)
    named = str(min(head_dims)) if len(head_dims) == 1 else f"{min(head_dims)} to {max(head_dims)}"
    itemsize = source.dtype.itemsize
    flops = 2 * elements + 2 * products
    return ServingCost(
        named,
        source.kv_bytes_per_token(plan),
        elements * itemsize,
        flops,
        source.caches,
        context_length(source.config),
        source.cache_bytes(plan),
    )


def _query_heads(source: Source, plan: Plan, layout: str | None) -> dict[str, int]:
    """Return by site the query heads that the layout writes, where it writes other counts than the source's."""
    config = folded_config(source, plan)
    written = query_heads(config, choose_layout(config, layout))
    return dict(zip((site.name for site in source.sites), written, strict=True)) if written else {}
