"""Whether an adapter was made for a model: not for the original where the model is a fold, nor for a fold where it is an original."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.cards import read_card
from ..core.errors import UserError
from .adapter import Adapter

_BASE = "base_model:"
"""Begins the line of a card that names the original."""
_PLAN = "plan.json"
"""Lies in every fold."""
MERGE_FIRST = "merge it into the original before folding: headfold fold ORIGINAL OUT --adapter DIR"


def refuse_adapter_of_original(adapter: Adapter, directory: Path) -> None:
    """Refuse an adapter that says that it was made for the model that the card of a fold names as its original.

    Heads of the original are merged and turned in the fold, so the adapter would change it at random, also where its shapes fit.

    Raises:
        UserError: it does.
    """
    named = adapter.config.get("base_model_name_or_path")
    original = next(
        (line[len(_BASE) :].strip() for line in read_card(directory).splitlines() if line.startswith(_BASE)), ""
    )
    made_for = Path(str(named)).name
    if named and original and made_for == Path(original).name and made_for != directory.resolve().name:
        raise UserError(
            f"{adapter.path}: expected an adapter made for {directory}, got one made for {named}, its original; {MERGE_FIRST}"
        )


def check_base(adapter: Adapter, base: Path, config: Mapping[str, Any]) -> None:
    """Check that an adapter may be merged into a base: by what both say of themselves, as shapes may fit where the heads are others.

    Raises:
        UserError: the adapter was made for the original of the base, or for a fold that the base is not; the base has projections that
            stock transformers does not.
    """
    if (
        base / _PLAN
    ).is_file():  # the card of any other model may name one that it was trained from, whose adapters suit it
        refuse_adapter_of_original(adapter, base)
    if "headfold" in config:
        raise UserError(
            f"{base}: expected a model of a class of transformers to merge an adapter into, got a fold that runs in headfold's runtime; "
            f"{MERGE_FIRST}"
        )
    named = adapter.config.get("base_model_name_or_path")
    made_for = Path(named).expanduser() if isinstance(named, str) and named else None
    if made_for is not None and (made_for / _PLAN).is_file() and not made_for.samefile(base):
        raise UserError(
            f"{adapter.path}: expected an adapter made for {base}, got one made for {made_for}, a fold; name that fold as the model, or "
            "pass the original's own adapter"
        )
