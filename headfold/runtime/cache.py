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
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_ROOM = 64
"""Tokens of the first room; each further one is twice what is then needed."""

States = Float[Tensor, "batch group token dim"]


class _InPlace(DynamicLayer):
    """What is common to layers that grow in place. `keys` and `values` are views of the written part of a larger room."""

    def lazy_initialization(self, key_states: States, value_states: States) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]

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

    def _grown(self, key_states: States, value_states: States, limit: int | None) -> tuple[States, States] | None:
        """Keys and values with the new ones behind; None under autograd, which forbids to write in place."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.requires_grad or value_states.requires_grad or self.keys.requires_grad:
            return None
        return _appended(self.keys, key_states, limit), _appended(self.values, value_states, limit)


class GrowingLayer(_InPlace):
    """The cache of one layer.

    `limit` is how long the cache will get, where that is known: no room is made beyond it.
    """

    def __init__(self, limit: int | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.limit = limit

    def update(self, key_states: States, value_states: States, *args: Any, **keywords: Any) -> tuple[States, States]:
        """Write the new tokens behind the old; returns all of them. Under autograd as stock."""
        grown = self._grown(key_states, value_states, self.limit)
        if grown is None:
            return super().update(key_states, value_states, *args, **keywords)
        self.keys, self.values = grown
        return grown


class GrowingSlidingLayer(_InPlace, DynamicSlidingWindowLayer):
    """The cache of one layer that sees a window: this slides along a room of twice its size, and is copied only at its end."""

    def update(self, key_states: States, value_states: States, *args: Any, **keywords: Any) -> tuple[States, States]:
        """Write the new tokens behind the old; returns those that the new ones may see. Under autograd as stock."""
        count, kept = key_states.shape[-2], self.sliding_window - 1
        # A long prompt is not worth a room: nearly all of it is out of sight at the next token.
        grown = self._grown(key_states, value_states, None) if count <= kept else None
        if grown is None:
            return super().update(key_states, value_states, *args, **keywords)
        self.cumulative_length += count
        if self.record_past:
            self.keys, self.values = grown
            return grown[0][:, :, -kept - count :, :], grown[1][:, :, -kept - count :, :]
        self.keys, self.values = (states[:, :, -kept:, :] for states in grown)
        return grown


def _appended(states: States, new: States, limit: int | None) -> States:
    """`states` with `new` behind, in the room that they lie in or, where that is full, in one twice as large."""
    length = states.shape[-2] + new.shape[-2]
    room, start = _room(states, new)
    if room is None:
        size = max(LEAST_ROOM, 2 * length)
        size = max(length, min(size, limit)) if limit is not None else size
        room = new.new_empty(*new.shape[:2], size, new.shape[-1])
        room[..., : states.shape[-2], :] = states
    room[..., start + states.shape[-2] : start + length, :] = new
    return room[..., start : start + length, :]


def _room(states: States, new: States) -> tuple[Tensor | None, int]:
    """The tensor that `states` lie in, and the token of it that is their first; none if it cannot take what is new."""
    room = states._base
    fits = (
        room is not None
        and room.dim() == 4
        and room.shape[:2] == states.shape[:2]
        and room.stride() == states.stride()
        and not room.requires_grad
        and states.shape[-2] > 0
        and (not room.is_inference() or torch.is_inference_mode_enabled())
        and states.dtype == new.dtype
    )
    if not fits:
        return None, 0
    start = (states.data_ptr() - room.data_ptr()) // (room.stride(-2) * room.element_size())
    return (room, start) if start + states.shape[-2] + new.shape[-2] <= room.shape[-2] else (None, 0)


class GrowingCache(DynamicCache):
    """A `DynamicCache` whose layers grow in place.

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
        cache.layers = [_growing(layer, limit) for layer in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer


def _growing(layer: Any, limit: int | None) -> Any:
    """The same kind of layer, empty, growing in place; any other kind as it is."""
    if type(layer) is DynamicSlidingWindowLayer:
        return GrowingSlidingLayer(layer.sliding_window)
    return GrowingLayer(limit) if type(layer) is DynamicLayer else layer


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
