"""The ONNX graphs of a model: what each is called, its inputs and outputs by name, and the module that torch's exporter traces.

The names are those that Hugging Face Optimum writes, so that programs which read its directories read these. A cache enters and leaves
a graph as flat tensors (batch, K/V head, token, head_dim), two per site.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from .inputs import model_inputs, random_tokens

ANSWERS = (
    ("logits",),
    ("start_logits", "end_logits"),
    ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
    ("text_embeds", "last_hidden_state"),
    ("image_embeds", "last_hidden_state"),
    ("last_hidden_state", "pooler_output"),
    ("last_hidden_state",),
)
"""Outputs of models that do not generate: the first of these that a model has as a whole."""
BATCH, TOKENS, PAST, SOURCE = 2, 5, 3, 7
"""Sizes that are traced: no two are equal, and none is 0 or 1, which a tracer takes for constants."""
_BATCH, _TOKENS, _PAST, _SOURCE = "batch_size", "sequence_length", "past_sequence_length", "encoder_sequence_length"
ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
CACHED = "past_key_values"
_TEXT, _OF_SOURCE, _OF_PAST = {0: _BATCH, 1: _TOKENS}, {0: _BATCH, 1: _SOURCE}, {0: _BATCH, 2: _PAST}

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One file to write. `module` takes a dict of tensors like `inputs`, and returns the tensors that `outputs` names.

    `axes` names the axes of each input that may have any size.
    """

    file: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    axes: Mapping[str, Mapping[int, str]]


@torch.no_grad()
def graphs_of(model: Any) -> list[Graph]:
    """Return the graphs of a model: `model.onnx`, or encoder, decoder and decoder with a cache where it generates from an encoder."""
    if not model.can_generate():
        return [_encoder(model)]
    return list(_encoder_decoder(model)) if model.config.is_encoder_decoder else [_language_model(model)]


def _encoder(model: Any) -> Graph:
    inputs = model_inputs(model, BATCH, TOKENS)
    outputs = answers(model(**inputs))
    images = {0: "image_batch_size" if "input_ids" in inputs else _BATCH}
    texts = {0: "text_batch_size", 1: _TOKENS} if "pixel_values" in inputs else _TEXT
    axes = {name: images if name == "pixel_values" else texts for name in inputs}
    return Graph(file="model.onnx", module=Forward(model, outputs), inputs=inputs, outputs=outputs, axes=axes)


def answers(said: Any) -> tuple[str, ...]:
    """Return which of `ANSWERS` the output of a model has as a whole."""
    return next(names for names in ANSWERS if all(isinstance(said.get(name), Tensor) for name in names))


def _language_model(model: Any) -> Graph:
    inputs, cache = model_inputs(model, BATCH, PAST + TOKENS), DynamicCache()
    model(**{name: tensor[:, :PAST] for name, tensor in inputs.items()}, past_key_values=cache, use_cache=True)
    past = _named({"": cache})
    new = {name: tensor if name == "attention_mask" else tensor[:, PAST:] for name, tensor in inputs.items()}
    axes = dict.fromkeys(new, _TEXT) | dict.fromkeys(past, _OF_PAST)
    axes["attention_mask"] = {0: _BATCH, 1: f"{_PAST} + {_TOKENS}"}
    outputs = ("logits", *_presents(past))
    return Graph(file="model.onnx", module=Step(model), inputs=new | past, outputs=outputs, axes=axes)


def encoder_masks(sources: Mapping[str, Tensor]) -> Inputs:
    """Return the mask of an encoder's inputs as a decoder takes it; none of sound."""
    return {f"encoder_{name}": tensor for name, tensor in sources.items() if name == "attention_mask"}


def _encoder_decoder(model: Any) -> Iterator[Graph]:
    sources, encoder, decoder = model_inputs(model, BATCH, SOURCE), Encoder(model), Decoder(model)
    axes = {name: {0: _BATCH} if name == "input_features" else _OF_SOURCE for name in sources}
    yield Graph(file=ENCODER, module=encoder, inputs=sources, outputs=("last_hidden_state",), axes=axes)
    masks, ids = encoder_masks(sources), {"input_ids": random_tokens(model.config, BATCH, PAST)}
    first = masks | ids | {"encoder_hidden_states": encoder(sources)[0]}
    axes = dict.fromkeys(first, _OF_SOURCE) | dict.fromkeys(ids, _TEXT)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    decoder.decoded(first, cache)
    past = _named({".decoder": cache.self_attention_cache, ".encoder": cache.cross_attention_cache})
    yield Graph(file=DECODER, module=decoder, inputs=first, outputs=("logits", *_presents(past)), axes=axes)
    ids = {"input_ids": random_tokens(model.config, BATCH, TOKENS)}
    axes = {name: axes[name] for name in masks | ids}
    axes |= {name: _OF_PAST if ".decoder." in name else {0: _BATCH, 2: _SOURCE} for name in past}
    outputs = ("logits", *(name for name in _presents(past) if ".decoder." in name))
    yield Graph(file=DECODER_WITH_PAST, module=decoder, inputs=masks | ids | past, outputs=outputs, axes=axes)


class Forward(nn.Module):
    """A model without a cache."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the outputs by name."""
        said = self.model(**inputs)
        return tuple(said[name] for name in self.outputs)


class Step(nn.Module):
    """A language model with its cache, of any length: 0 before the first token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return logits, and K and V of each layer with those of the new tokens."""
        cache = _cache(inputs, "")
        new = {name: tensor for name, tensor in inputs.items() if not name.startswith(CACHED)}
        said = self.model(**new, past_key_values=cache, use_cache=True)
        return (said.logits, *_named({"": cache}).values())


class Encoder(nn.Module):
    """The encoder of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, inputs: Inputs) -> tuple[Tensor]:
        """Return the last hidden states."""
        return (self.encoder(**inputs).last_hidden_state,)


class Decoder(nn.Module):
    """The decoder of a model, with or without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def decoded(self, inputs: Inputs, cache: EncoderDecoderCache) -> Tensor:
        """Return the logits of `input_ids` after what is in the cache, to which K and V are added."""
        states = inputs.get("encoder_hidden_states")
        if states is None:  # only their shape is read where K and V of the cross-attention are in the cache
            batch, _, length, _ = inputs[f"{CACHED}.0.encoder.key"].shape
            states = inputs[f"{CACHED}.0.encoder.key"].new_zeros(batch, length, self.model.config.hidden_size)
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inputs.get("encoder_attention_mask"),
            decoder_input_ids=inputs["input_ids"],
            past_key_values=cache,
            use_cache=True,
        ).logits

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return logits, and K and V of each layer; those of the cross-attention only if they were not in the cache."""
        own, crossed = _cache(inputs, ".decoder"), _cache(inputs, ".encoder")
        was_empty = not own.layers
        logits = self.decoded(inputs, EncoderDecoderCache(own, crossed))
        return (logits, *_named({".decoder": own} | ({".encoder": crossed} if was_empty else {})).values())


def _cache(inputs: Inputs, part: str) -> DynamicCache:
    """Return the cache that inputs hold. Its layers have no windows: the mask hides what has left one."""
    keys = [name for name in inputs if name.startswith(CACHED) and name.endswith(f"{part}.key")]
    return DynamicCache([(inputs[name], inputs[f"{name.removesuffix('key')}value"]) for name in keys])


def _named(caches: Mapping[str, DynamicCache]) -> dict[str, Tensor]:
    """Return the tensors of caches by their names as inputs: layer by layer, and for each the caches in this order."""
    layers = zip(*(cache.layers for cache in caches.values()), strict=True)
    return {
        f"{CACHED}.{n}{part}.{role}": tensor
        for n, pair in enumerate(layers)
        for part, layer in zip(caches, pair, strict=True)
        for role, tensor in (("key", layer.keys), ("value", layer.values))
    }


def _presents(past: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name.replace(CACHED, "present") for name in past)
