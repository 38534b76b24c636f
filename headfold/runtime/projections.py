"""The attention that all own forwards share: grouped projections, cache, output. A page per family adds what differs.

The text below this docstring is copied into checkpoints (`remote.py`), so it changes only on purpose.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import EAGER_NAME, Attention, implementation, joined, packed, routed, stock_eager

Turn = Callable[[Tensor], Tensor]


def project(module: Any, role: str, states: Tensor, *, batch: int) -> Tensor:
    """Return one projection by heads: (batch, token, model) as (batch, head or group, token, dim)."""
    site = module.headfold_site
    projected = getattr(module, site[role])(states)
    num_heads = projected.shape[-1] // site["head_dim"]
    return projected.view(batch, -1, num_heads, site["head_dim"]).transpose(1, 2)


def keys_and_values(
    module: nn.Module,
    states: Tensor,
    *,
    batch: int,
    layer: int | None,
    cache: Any = None,
    crosses: bool = False,
    turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:
    """Return grouped K and V (batch, group, key, dim): old ones from the cache, and new ones, which are written into it.

    `states` are (batch, token, model); at a site that `crosses` they are the encoder's output, which is projected once and cached.
    `turn` applies the rotary position.
    """
    both: Any = cache if isinstance(cache, EncoderDecoderCache) else None
    if both is not None:
        cache = both.cross_attention_cache if crosses else both.self_attention_cache
        if crosses and both.is_updated.get(layer):
            return cache.layers[layer].keys, cache.layers[layer].values
    key, value = (project(module, role, states, batch=batch) for role in "kv")
    key = turn(key) if turn else key
    if cache is None:
        return key, value
    if both is not None and crosses:
        both.is_updated[layer] = True
    return cache.update(key, value, layer)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    eager: Attention | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the output (batch, token, head · dim) of the attention that the model is set to, and the weights where it is eager.

    `eager` replaces the eager attention beside the stock class.
    """
    keywords["dropout"] = dropout if module.training else 0.0
    special = module.kv_of_query is not None or module.headfold_slots > 1
    name = implementation(module.config._attn_implementation, special=special)
    if name == EAGER_NAME:
        heads, keywords = joined(module, query, key, value, keywords)
        inner = partial(packed, eager or stock_eager(type(module)))
        output, weights = routed(inner)(module, *heads, mask, **keywords)
    else:
        output, weights = ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, **keywords)
    return output.flatten(2), weights
