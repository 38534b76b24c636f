"""Images by item for models that take the patches of all images as one row."""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def take_images_by_item(model: "PreTrainedModel") -> None:
    """Let a model that takes patches with a grid per image (Qwen2-VL) take `pixel_values` (item, patch, number), too.

    Samples have one row per item, so that batches can be drawn from them.
    """
    for module in {model, model.base_model}:
        if "image_grid_thw" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(_as_one_row, with_kwargs=True)


def _as_one_row(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pixels = kwargs.get("pixel_values")
    return args, kwargs if pixels is None or pixels.ndim != 3 else {**kwargs, "pixel_values": pixels.flatten(0, 1)}
