"""A K/V cache that grows in place: memory is reserved ahead, and a new token is written into it without copying the earlier ones.

Stock `DynamicCache` concatenates, and so copies the whole cache, at every step. The layers here are drop-in replacements:
`GrowingCache(config)` works wherever a `DynamicCache` does, with any stock model, and `headfold.load` makes `generate` use it.
They write in place under `no_grad` or in inference mode; where gradients are enabled, or a compiler traces, they concatenate as
stock does.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_ROOM = 64
"""Tokens that are reserved at first; each later reservation is twice what is needed then."""

NewKeys = Float[Tensor, "batch group new dim"]
NewValues = Float[Tensor, "batch group new value_dim"]
KeysAndValues = tuple[Float[Tensor, "batch group token dim"], Float[Tensor, "batch group token value_dim"]]


class _InPlace(DynamicLayer):
    """The common part of layers that grow in place. `keys` and `values` are views of the written part of the reserved tensors.

    `limit` is the final length of the cache where it is known: the first reservations are not larger.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, *arguments: Any, limit: int | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.limit = limit
        self._rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def lazy_initialization(self, key_states: NewKeys, value_states: NewValues) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]

    def reset(self) -> None:
        """Empty the cache and release the reserved tensors."""
        super().reset()
        self._rooms = (None, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Copy the beams that change their place; the others are left where they are."""
        if self.get_seq_length() == 0:
            return
        if len(beam_idx) != len(self.keys):
            super().reorder_cache(cast("torch.LongTensor", beam_idx))
            return
        index = beam_idx.to(self.keys.device)
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        for states in (self.keys, self.values):
            states[moved] = states[index[moved]]

    def _grown(self, key_states: NewKeys, value_states: NewValues) -> KeysAndValues | None:
        """Return keys and values with the new ones appended; None where autograd may need the old ones, or a compiler traces."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, key_room = _appended(self.keys, key_states, self._rooms[0], self.limit)
        values, value_room = _appended(self.values, value_states, self._rooms[1], self.limit)
        self._rooms = (key_room, value_room)
        return keys, values


class GrowingLayer(_InPlace):
    """The cache of one layer."""

    def update(self, key_states: NewKeys, value_states: NewValues, *args: Any, **keywords: Any) -> KeysAndValues:
        """Append the new tokens and return all of them. With gradients enabled this concatenates as stock does."""
        grown = self._grown(key_states, value_states)
        if grown is None:
            return super().update(key_states, value_states, *args, **keywords)
        self.keys, self.values = grown
        return grown


class GrowingSlidingLayer(_InPlace, DynamicSlidingWindowLayer):
    """The cache of one layer with a sliding window: the window moves along reserved tensors of twice its size, and is copied only at
    their end.
    """

    keys: Tensor
    values: Tensor

    def update(self, key_states: NewKeys, value_states: NewValues, *args: Any, **keywords: Any) -> KeysAndValues:
        """Append the new tokens and return those that the new ones may attend to. With gradients enabled this concatenates as stock
        does.
        """
        count, kept = key_states.shape[-2], self.sliding_window - 1
        # A long prompt is not worth a room: nearly all of it is out of sight at the next token.
        grown = self._grown(key_states, value_states) if count <= kept else None
        if grown is None:
            self._rooms = (None, None)
            return super().update(key_states, value_states, *args, **keywords)
        self.cumulative_length += count
        if self.record_past:
            self.keys, self.values = grown
            return grown[0][:, :, -kept - count :, :], grown[1][:, :, -kept - count :, :]
        self.keys, self.values = (states[:, :, -kept:, :] for states in grown)
        return grown


def _appended(
    states: Float[Tensor, "batch group old dim"],
    new: Float[Tensor, "batch group new dim"],
    room: Tensor | None,
    limit: int | None,
) -> tuple[Float[Tensor, "batch group token dim"], Tensor]:
    """Return `states` with `new` appended, and the tensor they lie in: `room` if they lie in it and it is large enough, else one of
    twice the size.
    """
    length = states.shape[-2] + new.shape[-2]
    start = None if room is None else _place(states, new, room)
    if room is None or start is None:
        size = max(LEAST_ROOM, 2 * length)
        size = max(length, min(size, limit)) if limit is not None and length <= limit else size
        start, room = 0, new.new_empty(*new.shape[:2], size, new.shape[-1])
        room[..., : states.shape[-2], :] = states
    room[..., start + states.shape[-2] : start + length, :] = new
    return room[..., start : start + length, :], room


def _place(
    states: Float[Tensor, "batch group old dim"], new: Float[Tensor, "batch group new dim"], room: Tensor
) -> int | None:
    """Return the index in `room` of the first token of `states`; None where they lie elsewhere or the room is too small for the new
    tokens.
    """
    inside = (
        states.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
        and room.shape[:2] == states.shape[:2]
        and room.stride() == states.stride()
        and states.shape[-2] > 0
        and states.dtype == new.dtype
        and (not room.is_inference() or torch.is_inference_mode_enabled())
    )
    if not inside:
        return None
    start = (states.data_ptr() - room.data_ptr()) // (room.stride(-2) * room.element_size())
    return start if start + states.shape[-2] + new.shape[-2] <= room.shape[-2] else None


class GrowingCache(DynamicCache):
    """A `DynamicCache` whose layers grow in place.

    Args:
        config: the model's config, which names its sliding layers.
        limit: tokens that the cache will hold at most.
    """

    def __init__(self, config: Any = None, limit: int | None = None, **keywords: Any) -> None:
        super().__init__(config=config, **keywords)
        grow_in_place(self, limit)


def grow_in_place(cache: Cache, limit: int | None = None) -> None:
    """Make the layers of an empty dynamic cache grow in place; of an encoder-decoder's cache only those of the decoder's own tokens."""
    if isinstance(cache, EncoderDecoderCache):
        grow_in_place(cache.self_attention_cache, limit)
    elif isinstance(cache, DynamicCache) and not cache.offloading:
        cache.layers = [_growing(layer, limit) for layer in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer


def _growing(layer: Any, limit: int | None) -> Any:
    """Return a layer of the same kind that grows in place, or the layer itself where there is none."""
    if type(layer) is DynamicSlidingWindowLayer:
        made = GrowingSlidingLayer(layer.sliding_window, limit=limit)
        made.record_past = layer.record_past
        return made
    return GrowingLayer(limit=limit) if type(layer) is DynamicLayer else layer


class _InPlaceCaches:
    """Replaces `_prepare_cache_for_generation` of one model, so that the dynamic caches it makes grow in place. A class, so that
    models pickle.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, longest: int, *rest: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        stock: Any = type(self.model)._prepare_cache_for_generation  # type: ignore[attr-defined]  # of GenerationMixin
        stock(self.model, generation_config, model_kwargs, mode, batch, longest, *rest)
        cache = model_kwargs.get("past_key_values")
        if given is None and cache is not None:
            grow_in_place(cache, longest)
        for layer in getattr(getattr(given, "self_attention_cache", given), "layers", ()):
            if isinstance(layer, _InPlace):
                layer.limit = longest


def generate_in_place(model: "PreTrainedModel") -> "PreTrainedModel":
    """Make `generate` of a model use caches that grow in place wherever it would use dynamic ones, and return the model."""
    vars(model)["_prepare_cache_for_generation"] = _InPlaceCaches(model)
    return model
