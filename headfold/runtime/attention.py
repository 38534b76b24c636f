"""Attention over grouped K/V heads: the queries of a group are rows of one matrix, so no key and no value is copied.

Registered with transformers under the name `headfold`, for every model whose attention goes through its attention interface.
The text below this docstring is copied into checkpoints (`remote.py`), so it changes only on purpose.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .decoding import FEW, choose, plain_attention, sdpa

NAME = "headfold"
EAGER_NAME = "headfold-eager"
"""The name of `eager` at a grouped site: the eager attention of the site's own class, on packed queries."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Packing:
    """The order of query heads by group: slot → head, with `num_heads` in an empty slot; None where the heads are in this order
    already.
    """

    num_heads: int
    num_kv_heads: int
    slots: tuple[int, ...] | None = None

    @property
    def queries_per_group(self) -> int:
        """Slots of each group: as many as the largest group has queries."""
        return len(self.slots or range(self.num_heads)) // self.num_kv_heads

    def rows(self, heads: Tensor) -> Tensor:
        """Return (batch, head, token, dim) as (batch, group, query · token, dim); empty slots hold zeros, or True."""
        batch, _, tokens, dim = heads.shape
        if self.slots is not None:
            blank = torch.full_like(heads[:, :1], heads.dtype == torch.bool)
            heads = torch.cat([heads, blank], 1).index_select(1, torch.tensor(self.slots, device=heads.device))
        return heads.reshape(batch, self.num_kv_heads, self.queries_per_group * tokens, dim)

    def mask_rows(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """Return a mask or bias (batch, head or 1, token or 1, key) in the same order; one that is common to all rows is returned as
        it is.
        """
        if mask is None or mask.shape[1:3] == (1, 1):
            return mask
        mask = mask.expand(-1, -1, tokens, -1)
        return mask.repeat(1, 1, self.queries_per_group, 1) if mask.shape[1] == 1 else self.rows(mask)

    def heads(self, rows: Tensor, tokens: int) -> Tensor:
        """Return (batch, group, query · token, dim) as (batch, head, token, dim)."""
        heads = rows.reshape(rows.shape[0], self.num_kv_heads * self.queries_per_group, tokens, rows.shape[-1])
        if self.slots is None:
            return heads
        order = [self.slots.index(head) for head in range(self.num_heads)]
        return heads.index_select(1, torch.tensor(order, device=rows.device))


@functools.cache
def packing(num_heads: int, num_kv_heads: int, kv_of_query: tuple[int, ...] | None) -> Packing:
    """Return the packing of equal groups of neighbours or, by `kv_of_query`, of any groups, with smaller groups filled up to the
    largest.
    """
    if kv_of_query is None:
        assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
        return Packing(num_heads, num_kv_heads)
    members = [[head for head, kv in enumerate(kv_of_query) if kv == group] for group in range(num_kv_heads)]
    largest = max(map(len, members))
    return Packing(
        num_heads, num_kv_heads, tuple(slot for m in members for slot in m + [num_heads] * (largest - len(m)))
    )


def packed(
    attention: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run an attention function that expects one K/V head per query head on grouped heads.

    `query` is (batch, head, token, dim), `key` and `value` (batch, group, key, dim), masks and biases (batch, head or 1, token, key).
    Returns the output (batch, token, head, dim), and the weights (batch, head, token, key) where `attention` returns them.
    """
    tokens = query.shape[2]
    by = packing(query.shape[1], key.shape[1], getattr(module, "kv_of_query", None))
    for name in {"position_bias", "sinks"} & keywords.keys():
        keywords[name] = by.mask_rows(keywords[name], tokens)
    mask = by.mask_rows(attention_mask, tokens)
    output, weights = attention(module, by.rows(query), key, value, mask, **keywords)
    output = by.heads(output.transpose(1, 2), tokens).transpose(1, 2).contiguous()
    return output, None if weights is None else by.heads(weights, tokens)


def routed(attention: Attention) -> Attention:
    """Wrap an attention function: where the module has a route, that decides which query reads which K/V head, and receives the
    output.
    """

    @functools.wraps(attention)
    def run(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        route = getattr(module, "headfold_route", None)
        if route is None:
            return attention(module, query, key, value, attention_mask, **keywords)
        module.kv_of_query = route(key, attention_mask)
        output, weights = attention(module, query, key, value, attention_mask, **keywords)
        return route.perturbed(output), weights

    return run


@routed
def headfold_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention `headfold`: computes what `sdpa` does. Shapes as in `packed`; a mask is boolean (True: attend) or additive.

    Where the heads of the module are stored in several slots, `query`, `key` and `value` hold each slot as a head of its own.

    Raises:
        ValueError: a mask or a cache in the form of another implementation.
    """
    if keywords.pop("cache", None) is not None or (attention_mask is not None and attention_mask.dim() != 4):
        raise ValueError("headfold attention: expected a mask of 4 dimensions and no paged cache; use sdpa instead")
    tokens = query.shape[2]
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and tokens > 1:
        # Keys beyond the queries are a static cache's unwritten ones: without a mask the cache was empty before.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        position_bias = None if position_bias is None else position_bias[..., :tokens]
    query, keywords = in_slots(module, query, keywords)
    slots = getattr(module, "headfold_slots", 1)
    if slots > 1:  # a view: at every new token, joining the slots would copy the cache
        key, value = (t.unflatten(1, (-1, slots)) for t in (key, value))
    plain = s_aux is not None or keywords.get("softcap") is not None
    if tokens > FEW and not plain and (position_bias is None or not causal):
        mask = _added(attention_mask, position_bias, query.dtype)
        return repeated(module, query, key, value, mask, is_causal=causal, **keywords)
    if causal and tokens > 1:
        attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    mask = _added(attention_mask, position_bias, query.dtype)
    sinks = None if s_aux is None else s_aux.reshape(1, -1, 1, 1)
    inner = plain_attention if plain or slots > 1 else _decode
    output, _ = packed(inner, module, query, key, value, mask, sinks=sinks, **keywords)
    return output, None


def _added(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is not None and mask is not None and mask.dtype == torch.bool:
        return torch.where(mask, bias.to(dtype), torch.finfo(dtype).min)
    mask = bias if mask is None else mask if bias is None else mask + bias
    return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)


def _decode(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Attention on packed rows by the implementation that is fastest here."""
    return choose(query, key, value, mask)(module, query, key, value, mask, **keywords)


def repeated(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of many queries on repeated K and V: products take longer than the copy, and the fused kernel skips what a causal
    mask hides.
    """
    key, value = (t.transpose(2, 3).flatten(3) if t.dim() == 5 else t for t in (key, value))
    index = getattr(module, "kv_of_query", None)
    if index is None:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    else:
        key, value = (t[:, list(index)] for t in (key, value))
    output, _ = sdpa(module, query, key, value, mask, is_causal=is_causal, **keywords)
    return output.contiguous(), None


def stock_eager(attention: type) -> Attention:
    """Return the eager attention beside a stock class; the plain one where the class has it as a method."""
    modules = (vars(sys.modules[base.__module__]) for base in attention.__mro__)
    return next(
        (names["eager_attention_forward"] for names in modules if "eager_attention_forward" in names), plain_attention
    )


def in_slots(module: nn.Module, query: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return queries (batch, head · slot, token, dim) as (batch, head, token, slot · dim), and the keywords with the scale of their
    logits.
    """
    slots = getattr(module, "headfold_slots", 1)
    if slots == 1:
        return query, keywords
    scaling = keywords.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return join(query, slots), {**keywords, "scaling": scaling * module.headfold_scale}


def join(heads: Tensor, slots: int) -> Tensor:
    """Return (batch, head · slot, token, dim) as (batch, head, token, slot · dim)."""
    return heads.unflatten(1, (-1, slots)).transpose(2, 3).flatten(3) if slots > 1 else heads


def joined(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, keywords: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Return query, key and value with their slots joined, for attention functions without slots; a copy where there are several
    slots.
    """
    slots = getattr(module, "headfold_slots", 1)
    query, keywords = in_slots(module, query, keywords)
    return (query, join(key, slots), join(value, slots)), keywords


@routed
def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention `headfold-eager`: the numbers and weights of the stock attention, computed from grouped heads."""
    heads, keywords = joined(module, query, key, value, keywords)
    states = (*heads, mask)
    if getattr(module, "sinks", None) is not None:  # stock functions take them from the module, one per query head
        sinks = module.sinks.reshape(1, -1, 1, 1)
        return packed(plain_attention, module, *states, sinks=sinks, **keywords)
    return packed(stock_eager(type(module)), module, *states, **keywords)


def implementation(name: str, *, special: bool) -> str:
    """Return the attention of a grouped site whose model is set to `name`; `special` groups or slots need headfold's own."""
    return EAGER_NAME if name == "eager" else NAME if special else name


def headfold_mask(*sizes: Any, config: Any = None, **keywords: Any) -> Tensor | None:
    """Return a mask for `headfold`: boolean or None as for `sdpa`, but additive as for `eager` where a class expects that."""
    config_class: type = type(config)
    build = sdpa_mask if _reads_boolean_masks(config_class) else eager_mask
    return build(*sizes, config=config, **keywords)


@functools.cache
def _reads_boolean_masks(config_class: type) -> bool:
    models: Any = MODEL_MAPPING.get(config_class, None) or ()
    return any(model._supports_sdpa for model in (models if isinstance(models, tuple) else (models,)))


def register(*, replace: bool) -> None:
    """Register both attention functions and their masks with transformers, which makes no mask for an attention without an entry."""
    if replace or NAME not in AttentionInterface():
        AttentionInterface.register(NAME, headfold_attention)
        AttentionInterface.register(EAGER_NAME, eager_attention)
        AttentionMaskInterface.register(NAME, headfold_mask)
        AttentionMaskInterface.register(EAGER_NAME, eager_mask)


if __name__.startswith("headfold."):
    from . import kernel  # noqa: F401 - one more candidate, which a file beside a checkpoint does without

    register(replace=True)
