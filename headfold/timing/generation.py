"""The time of every new token in `generate`, after reading a prompt or with a cache filled in its place."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.streamers import BaseStreamer

from ..runtime.cache import GrowingCache
from .machine import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting of a generation: `new_tokens` after a prompt of `context` tokens, for `batch` samples at once.

    `padded`: half of the samples are an eighth shorter and padded on the left. `skip_prefill`: the cache of all tokens but the
    last is filled with arbitrary numbers, so that new tokens are timed without reading the prompt.
    """

    context: int
    batch: int
    new_tokens: int
    padded: bool = False
    skip_prefill: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """The timing of one call of `generate`, in seconds: `first` is the time to the first token, `tokens` that of each later one."""

    first: float
    tokens: tuple[float, ...]
    num_kv_heads: tuple[int, ...]
    """K/V heads by cached layer of the decoder, cross-attention after self-attention."""
    kv_bytes: int
    """Size of the cache at the end."""
    peak_bytes: int | None
    """Largest memory use above that before the call; None where it cannot be measured."""


class Clock(BaseStreamer):
    """A streamer that notes when tokens arrive and calls `on_first` at the first new one."""

    def __init__(self, on_first: Callable[[], Any] | None = None) -> None:
        self.times: list[float] = []
        self._on_first = on_first

    def put(self, value: Tensor) -> None:
        """Note the time. The prompt comes first, then the tokens of each step."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2 and self._on_first is not None:
            self._on_first()

    def end(self) -> None:
        """Do nothing, as no tokens are held back."""


def generate(
    model: "PreTrainedModel", setting: Setting, *, grows: bool, on_first: Callable[[], Any] | None = None
) -> Timing:
    """Generate greedily and return the timing. With `grows` the cache is one that grows in place, where it is made here."""
    clock = Clock(on_first)
    inputs = _inputs(model, setting)
    count = setting.new_tokens
    with torch.no_grad(), peak_memory(str(model.device)) as peak:
        if setting.skip_prefill:
            inputs |= _filled(model, setting, grows=grows)
        started = time.perf_counter()
        output = cast(Any, model).generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1, pad_token_id=0,
            use_cache=True, streamer=clock, return_dict_in_generate=True,
        )  # fmt: skip
    arrived = clock.times[1:]
    layers = [layer for part in parts(output.past_key_values) for layer in _layers(part) if layer.keys is not None]
    return Timing(
        first=arrived[0] - started,
        tokens=tuple(after - before for before, after in zip(arrived, arrived[1:], strict=False)),
        num_kv_heads=tuple(layer.keys.shape[1] for layer in layers),
        kv_bytes=sum(states.numel() * states.element_size() for layer in layers for states in (layer.keys, layer.values)),
        peak_bytes=peak.num_bytes,
    )  # fmt: skip


def cache_bytes(model: "PreTrainedModel", setting: Setting) -> int:
    """Return the size of a cache of all tokens, as if no layer had a sliding window."""
    *own, last = parts(_example(model))
    lengths = [setting.context + setting.new_tokens] if not own else [setting.new_tokens, setting.context]
    return setting.batch * sum(
        length * (layer.keys.nbytes + layer.values.nbytes)
        for part, length in zip([*own, last], lengths, strict=True)
        for layer in _layers(part)
    )


@runtime_checkable
class _Layer(Protocol):
    """A layer of a cache, with (batch, head, token, dim) states."""

    keys: Tensor
    values: Tensor


def _layers(cache: Cache) -> Sequence[_Layer]:
    return cast(Sequence[_Layer], cache.layers)


def parts(cache: Cache) -> tuple[Cache, ...]:
    """Return the cache of self-attention and, in an encoder-decoder, that of cross-attention."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def _inputs(model: "PreTrainedModel", setting: Setting) -> dict[str, Tensor]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (setting.batch, setting.context), generator=draw)
    mask = torch.ones_like(ids)
    if setting.padded:
        mask[::2, : setting.context // 8] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _filled(model: "PreTrainedModel", setting: Setting, *, grows: bool) -> dict[str, Any]:
    """Return the cache of a prompt that is not read, as arguments of `generate`, with an encoder output where there is an encoder."""
    config = model.config
    if not config.is_encoder_decoder:
        limit = setting.context + setting.new_tokens
        cache = GrowingCache(config, limit) if grows else DynamicCache(config=config)
        return {"past_key_values": _fill(cache, _example(model), setting, setting.context - 1)}
    from transformers.modeling_outputs import BaseModelOutput

    example = cast(EncoderDecoderCache, _example(model))
    own = GrowingCache(config, setting.new_tokens + 1) if grows else DynamicCache(config=config)
    cross = _fill(DynamicCache(), example.cross_attention_cache, setting, setting.context)
    both = EncoderDecoderCache(own, cross)
    both.is_updated = dict.fromkeys(range(len(cross.layers)), True)
    hidden_size = model.get_encoder().config.hidden_size
    hidden = torch.zeros(setting.batch, setting.context, hidden_size, dtype=model.dtype, device=model.device)
    return {"past_key_values": both, "encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}


def _example(model: "PreTrainedModel") -> Cache:
    """Return the cache of one token, which shows the heads and head_dims of all layers."""
    one = torch.full((1, 1), 2, device=model.device)
    extra = {"decoder_input_ids": one} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=one, use_cache=True, **extra).past_key_values


def _fill(cache: Cache, example: Cache, setting: Setting, length: int) -> Cache:
    """Fill a cache with numbers of the usual size, in memory of their own: pages that were never written would all be one page."""
    for number, layer in enumerate(_layers(example)):
        one = torch.randn(1, 1, 256, layer.keys.shape[-1], device=layer.keys.device).to(layer.keys.dtype)
        groups = layer.keys.shape[1]
        states = one.repeat(1, 1, -(-length // 256), 1)[:, :, :length].expand(setting.batch, groups, -1, -1)
        cache.update(states, states, number)
    return cache
