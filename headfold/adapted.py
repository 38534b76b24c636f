"""Apply a LoRA adapter to a running fold, after checking that it was trained on the fold and not on the original."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.hub import locate_adapter
from .core.errors import UserError
from .hf_models import quiet
from .hf_models.building import library_errors
from .sources.adapter import Adapter, open_adapter
from .sources.bases import MERGE_FIRST, refuse_adapter_of_original

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_adapter(model: "PreTrainedModel", directory: Path, adapter: str | Path) -> "PreTrainedModel":
    """Return the model of a fold with an adapter of peft added to it.

    Raises:
        UserError: there is no peft or no adapter, or the adapter was made for the original of the fold: heads of the original are
            merged and turned there, so it would change the model at random, also where its shapes fit.
    """
    opened = open_adapter(locate_adapter(str(adapter)))
    _refuse_stale_shapes(model, opened, directory)
    refuse_adapter_of_original(opened, directory)
    with library_errors(opened.path, "peft does not load this adapter"), quiet():
        model.load_adapter(str(opened.path))
    return model


def _refuse_stale_shapes(model: "PreTrainedModel", adapter: Adapter, directory: Path) -> None:
    modules: dict[str, Any] = dict(model.named_modules())
    for name, parts in adapter.added.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise UserError(
                f"{adapter.path}: expected modules of {directory}, got {name}, which it lacks; pass its own adapter"
            )
        down, up = (parts.get(f"embedding_{side}", parts.get(side)) for side in "AB")
        assert down is not None and up is not None
        product = len(up), down.shape[1]
        if sorted(weight.shape) != sorted(product):
            raise UserError(
                f"{adapter.path}: {name}: expected an adapter for the shape {tuple(weight.shape)}, got one for {product}, as the "
                f"original of {directory} has; {MERGE_FIRST}"
            )
