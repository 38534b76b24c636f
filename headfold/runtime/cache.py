"""A K/V cache that grows in place: room is kept ahead, and a new token is written into it instead of copying all that came before.

Stock `DynamicCache` concatenates at every step, that is it copies the whole cache for each new token. The layers here are drop-in:
`GrowingCache(config)` goes wherever a `DynamicCache` does, with any stock model, and `headfold.load` gives it to `generate`.
"""

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_ROOM = 64
"""Tokens of the first room; each further one is twice what is then needed."""

States = Float[Tensor, "batch group token dim"]


class GrowingLayer(DynamicLayer):
    """The cache of one layer. `keys` and `values` are views of the written part of a larger room.

    `limit` is how long the cache will get, where that is known: no room is made beyond it.
    """

    def __init__(self, limit: int | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.limit = limit

    def lazy_initialization(self, key_states: States, value_states: States) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]

    def update(self, key_states: States, value_states: States, *args: Any, **keywords: Any) -> tuple[States, States]:
        """Write the new tokens behind the old; returns all of them. Under autograd, which forbids that, as stock."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.requires_grad or value_states.requires_grad or self.keys.requires_grad:
            return super().update(key_states, value_states, *args, **keywords)
        self.keys = _appended(self.keys, key_states, self.limit)
        self.values = _appended(self.values, value_states, self.limit)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams that stay where they are cost nothing; the others are copied into their places."""
        if self.get_seq_length() == 0:
            return
        if len(beam_idx) != len(self.keys):
            super().reorder_cache(beam_idx)
            return
        index = beam_idx.to(self.keys.device)
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        for states in (self.keys, self.values):
            states[moved] = states[index[moved]]


def _appended(states: States, new: States, limit: int | None) -> States:
    """`states` with `new` behind, in the room that they lie in or, where that is full, in one twice as large."""
    length = states.shape[-2] + new.shape[-2]
    room = _room(states, new, length)
    if room is None:
        size = max(LEAST_ROOM, 2 * length)
        size = max(length, min(size, limit)) if limit is not None else size
        room = new.new_empty(*new.shape[:2], size, new.shape[-1])
        room[..., : states.shape[-2], :] = states
    room[..., states.shape[-2] : length, :] = new
    return room[..., :length, :]


def _room(states: States, new: States, length: int) -> Tensor | None:
    """The tensor that `states` are the first tokens of, if it can take what is new."""
    room = states._base
    fits = (
        room is not None
        and room.dim() == 4
        and room.shape[-2] >= length
        and room.shape[:2] == states.shape[:2]
        and room.stride() == states.stride()
        and room.data_ptr() == states.data_ptr()
        and not room.requires_grad
        and states.shape[-2] > 0
        and (not room.is_inference() or torch.is_inference_mode_enabled())
        and states.dtype == new.dtype
    )
    return room if fits else None


class GrowingCache(DynamicCache):
    """A `DynamicCache` whose full layers grow in place; sliding ones hold a window only, and stay stock.

    Args: `config` of the model, so that its sliding layers are known; `limit`, tokens that the cache will hold at most.
    """

    def __init__(self, config: Any = None, limit: int | None = None, **keywords: Any) -> None:
        super().__init__(config=config, **keywords)
        grow_in_place(self, limit)


def grow_in_place(cache: Cache, limit: int | None = None) -> None:
    """Let the layers of an empty dynamic cache grow in place; of an encoder-decoder's that of the decoder's own tokens."""
    if isinstance(cache, EncoderDecoderCache):
        grow_in_place(cache.self_attention_cache, limit)
    elif isinstance(cache, DynamicCache) and not cache.offloading:
        cache.layers = [GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer


def generate_in_place(model: "PreTrainedModel") -> "PreTrainedModel":
    """Let `generate` of a model use caches that grow in place wherever it would take dynamic ones; returns the model."""
    stock: Callable[..., None] = type(model)._prepare_cache_for_generation

    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, longest: int, *rest: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        stock(self, generation_config, model_kwargs, mode, batch, longest, *rest)
        cache = model_kwargs.get("past_key_values")
        if given is None and cache is not None:
            grow_in_place(cache, longest)

    model._prepare_cache_for_generation = MethodType(prepare, model)
    return model
