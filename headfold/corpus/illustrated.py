"""Texts with one image each as the language model inside a wrapper reads them, in the words of the wrapper's own processor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..hf_models.building import library_errors, quiet
from ..hf_models.readers import open_joint_processor
from .captions import drawn_captions
from .images import in_blocks
from .rows import Table


def read_illustrated(
    source: str | Table,
    path: Path,
    context: int,
    columns: Sequence[str],
    num_items: int | None,
    seed: int | None,
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, Tensor]:
    """Return the inputs of a wrapper in directory `path` for images that are answered with their texts, one row each, texts padded on the
    right.

    Rows are drawn as `captions.read_captions` draws them. Those with more than `context` tokens are left out, and `say` is told.

    Raises:
        UserError: a source that is not a table, a missing column, an image that cannot be decoded, no processor, one that makes inputs
            of several sizes, or no row that is short enough.
    """
    processor, name_of_source = open_joint_processor(path), str(source)
    items = []
    for block in in_blocks(drawn_captions(source, columns, num_items, seed), name_of_source):
        items += [_processed(processor, image(), text, path) for image, text in block]
    short = [item for item in items if item["input_ids"].shape[1] <= context]
    if not short:
        least = min(item["input_ids"].shape[1] for item in items)
        raise UserError(
            f"{source}: expected an image with its text in {context} tokens, got {least} or more; raise --context"
        )
    if len(short) < len(items):
        say(
            f"{len(items) - len(short)} of {len(items)} images with their texts have more than {context} tokens, and are left out"
        )
    return {name: _joined(name, [item[name] for item in short], name_of_source) for name in short[0]}


def _processed(processor: Any, image: Any, text: str, path: Path) -> Mapping[str, Tensor]:
    with library_errors(path, "the processor does not work"), quiet():
        made = processor(images=[image], text=[_prompt(processor, text)], return_tensors="pt")
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in made.items()}


def _prompt(processor: Any, text: str) -> str:
    """Return a text that answers to an image: as the processor's chat template writes that, else after the token of an image."""
    if getattr(processor, "chat_template", None):
        turns = {"user": {"type": "image"}, "assistant": {"type": "text", "text": text}}
        return processor.apply_chat_template(
            [{"role": role, "content": [content]} for role, content in turns.items()], tokenize=False
        )
    token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or ""
    return f"{token}{text}"


def _joined(name: str, parts: list[Tensor], source: str) -> Tensor:
    """Return the inputs of all items as one tensor, an item per row; those that have a number per token end with zeros."""
    if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        longest = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1 or shapes[0][0] != 1:
        got = " and ".join(map(str, shapes[:2]))
        raise UserError(
            f"{source}: {name}: expected inputs of one size, (1, …) for each image, from the model's processor, got {got}; resize the "
            "images to one size, or calibrate on text"
        )
    return torch.cat(parts)
