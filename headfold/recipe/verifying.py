"""The data on which a fold is compared with its twin: a little, and real where there is any."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..corpus import open_corpus
from ..corpus.samples import kind_of
from ..corpus.windows import token_windows
from ..hf_models import open_tokenizer
from .measuring import Teacher
from .source import Source, context_limit

TOKENS = 256
"""Length of each of the two windows of text."""
ITEMS = 4
"""Of other data."""


def verification_sample(source: Source, run: Teacher, notes: list[str]) -> Mapping[str, Tensor]:
    """Two windows of text, or the first items of the calibration data; random inputs, and a note, where there is neither."""
    config = source.checkpoint.config
    kind = kind_of(config)
    if kind == "text":
        return {"input_ids": _windows(source, notes)}
    if run.data is not None:
        return {name: tensor[:ITEMS] for name, tensor in run.sample.items()}
    notes.append("no calibration data: verified on random inputs")
    return random_sample(kind, config)


def _windows(source: Source, notes: list[str]) -> Tensor:
    config = source.checkpoint.config
    length = min(TOKENS, context_limit(config) or TOKENS)
    try:
        tokenizer = open_tokenizer(source.checkpoint.path)
    except UserError:
        notes.append("no tokenizer beside the checkpoint: verified on random token numbers")
        return _tokens(config, 2, length)
    return token_windows(open_corpus("stdlib", seed=0).documents, tokenizer, 2 * length, length, 0)


def random_sample(kind: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of the right shapes, for a model of which nothing else is known."""
    generator = torch.Generator().manual_seed(0)
    if kind == "captions":
        texts, pictures = (
            random_sample(k, config[f"{n}_config"]) for k, n in (("sentences", "text"), ("images", "vision"))
        )
        return {**texts, **pictures}
    if kind == "images":
        size = config.get("image_size", 224)
        shape = (ITEMS, config.get("num_channels", 3), *((size, size) if isinstance(size, int) else size))
        return {"pixel_values": torch.randn(shape, generator=generator)}
    if kind == "audio":
        frames = 2 * config.get("max_source_positions", 1500)
        features = torch.randn((ITEMS, config.get("num_mel_bins", 80), frames), generator=generator)
        return {"input_features": features, "labels": _tokens(config, ITEMS, 16)}
    tokens = _tokens(config, ITEMS, min(32, context_limit(config) or 32))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs if kind == "sentences" else {**inputs, "labels": _tokens(config, ITEMS, 24)}


def _tokens(config: Mapping[str, Any], num_items: int, length: int) -> Tensor:
    return torch.randint(config["vocab_size"], (num_items, length), generator=torch.Generator().manual_seed(0))
