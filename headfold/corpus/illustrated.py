"""Texts with one image, or one recording, each as the language model inside a wrapper reads them, in the words of the wrapper's own
processor."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..hf_models.building import library_errors, quiet
from ..hf_models.readers import open_joint_processor
from .audio import draw_recordings, resampled
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
    processor, items = open_joint_processor(path, "images"), []
    for block in in_blocks(drawn_captions(source, columns, num_items, seed), str(source)):
        for image, text in block:
            make = partial(processor, images=[image()], text=[_prompt(processor, text, "image")])
            items.append(_processed(make, path))
    return _together(items, context, "images with their texts", str(source), say)


def read_spoken(
    source: str | Table,
    path: Path,
    context: int,
    columns: Sequence[str],
    num_items: int | None,
    seed: int | None,
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, Tensor]:
    """Return the same for recordings that are answered with their transcripts.

    Raises:
        UserError: as `read_illustrated`, of sound that cannot be decoded; no transcripts.
    """
    processor, items = open_joint_processor(path, "audio"), []
    rate = processor.feature_extractor.sampling_rate
    drawn = draw_recordings(source, columns, num_items, seed, written=True)
    if drawn is None or drawn.texts is None:
        raise UserError(
            f"{source}: expected sound with a text each, got none; name its columns with --columns AUDIO,TEXT"
        )
    for number, text in enumerate(drawn.texts):
        sound = resampled(*drawn.sound(number), rate)
        make = partial(processor, audio=[sound], text=[_prompt(processor, text, "audio")], sampling_rate=rate)
        items.append(_processed(make, path))
    return _together(items, context, "recordings with their texts", str(source), say)


def _together(
    items: list[Mapping[str, Tensor]], context: int, what: str, source: str, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Return the inputs of the items that have at most `context` tokens, one row each."""
    short = [item for item in items if item["input_ids"].shape[1] <= context]
    if not short:
        least = min(item["input_ids"].shape[1] for item in items)
        raise UserError(f"{source}: expected {what} in {context} tokens, got {least} or more; raise --context")
    if len(short) < len(items):
        say(f"{len(items) - len(short)} of {len(items)} {what} have more than {context} tokens, and are left out")
    return {name: _joined(name, [item[name] for item in short], source) for name in short[0]}


def _processed(make: Callable[..., Mapping[str, Tensor]], path: Path) -> Mapping[str, Tensor]:
    """Return what the processor makes of one item; the patches of an image, which some processors give one by one, are one row."""
    with library_errors(path, "the processor does not work"), quiet():
        made = dict(make(return_tensors="pt"))
        if "image_grid_thw" in made:
            made["pixel_values"] = made["pixel_values"][None]
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in made.items()}


def _prompt(processor: Any, text: str, what: str) -> str:
    """Return a text that answers to an "image" or "audio": as the processor's chat template writes that, else after the token of one."""
    if getattr(processor, "chat_template", None):
        turns = {"user": {"type": what}, "assistant": {"type": "text", "text": text}}
        return processor.apply_chat_template(
            [{"role": role, "content": [content]} for role, content in turns.items()], tokenize=False
        )
    begins = getattr(processor, "boi_token", None) if what == "image" else None
    token = begins or getattr(processor, f"{what}_token", None) or ""
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
            f"{source}: {name}: expected inputs of one size, (1, …) for each item, from the model's processor, got {got}; "
            "resize images to one size, or calibrate on text"
        )
    return torch.cat(parts)
