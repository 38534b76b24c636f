"""Apply a LoRA adapter to a running fold, after checking that it was trained on the fold and not on the original."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.cards import read_card
from .checkpoint.hub import locate_adapter
from .core.errors import UserError
from .hf_models import quiet
from .hf_models.building import library_errors
from .sources.adapter import Adapter, open_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BASE = "base_model:"
"""Begins the line of a card that names the original."""
_ADVICE = "merge it into the original before folding: headfold fold ORIGINAL OUT --adapter DIR"


def with_adapter(model: "PreTrainedModel", directory: Path, adapter: str | Path) -> "PreTrainedModel":
    """Return the model of a fold with an adapter of peft added to it.

    Raises:
        UserError: there is no peft or no adapter, or the adapter was made for the original of the fold: heads of the original are
            merged and turned there, so it would change the model at random, also where its shapes fit.
    """
    opened = open_adapter(locate_adapter(str(adapter)))
    _refuse_stale_shapes(model, opened, directory)
    _refuse_original(opened, directory)
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
                f"original of {directory} has; {_ADVICE}"
            )


def _refuse_original(adapter: Adapter, directory: Path) -> None:
    """Refuse an adapter that says that it was made for the model that the fold's card names as its original."""
    named = adapter.config.get("base_model_name_or_path")
    original = next(
        (line[len(_BASE) :].strip() for line in read_card(directory).splitlines() if line.startswith(_BASE)), ""
    )
    made_for = Path(str(named)).name
    if named and original and made_for == Path(original).name and made_for != directory.resolve().name:
        raise UserError(
            f"{adapter.path}: expected an adapter made for {directory}, got one made for {named}, its original; {_ADVICE}"
        )


_BASE = "base_model:"
