"""Random inputs of a model in the sizes that are asked for: to trace its graphs with, and to compare what they compute."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ..corpus.samples import kind_of

SEGMENTED = ("bert", "albert")
"""`model_type`s whose graphs take `token_type_ids`, as in Optimum: others that have a table of them get zeros from their tokenizers."""


def model_inputs(model: Any, batch: int, tokens: int) -> dict[str, Tensor]:
    """Return inputs of the model's forward or, where it generates from an encoder, of that encoder.

    Texts are (batch, token); all rows after the first are padded by a token, on the left where the model is a language model. Images
    are one more than texts, so that a graph in which the two numbers are mixed up fails.
    """
    config = model.config
    kind = kind_of(config.to_dict())
    if kind == "audio":
        return {"input_features": _normal(batch, config.num_mel_bins, 2 * config.max_source_positions, like=model)}
    if kind == "images":
        return _images(model, config, batch)
    texts = _texts(model, batch, tokens, on_the_left=kind == "text")
    return {**texts, **_images(model, config.vision_config, batch + 1)} if kind == "captions" else texts


def random_tokens(config: Any, batch: int, tokens: int) -> Tensor:
    """Return token ids (batch, token)."""
    size = config.get_text_config().vocab_size
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(batch * tokens))


def _texts(model: Any, batch: int, tokens: int, *, on_the_left: bool) -> dict[str, Tensor]:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1:, 0 if on_the_left else -1] = 0
    inputs = {"input_ids": random_tokens(model.config, batch, tokens), "attention_mask": mask}
    if model.config.model_type in SEGMENTED:
        inputs["token_type_ids"] = inputs["input_ids"] % model.config.type_vocab_size
    if on_the_left and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def _images(model: Any, config: Any, count: int) -> dict[str, Tensor]:
    size = config.image_size
    return {
        "pixel_values": _normal(
            count, config.num_channels, *([size, size] if isinstance(size, int) else size), like=model
        )
    }


def _normal(*shape: int, like: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(like.dtype)
