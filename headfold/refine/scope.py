"""How a fold is refitted and healed: what is trained together, and on how much data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import answers
from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..core.stats import NARROW
from ..families.spec import Site
from ..hf_models import exceeds_memory, stored_dtype, total_memory
from . import distill, heal

_DEFAULTS = {"model": (distill.TOKENS, distill.ITEMS), "block": (heal.TOKENS, heal.ITEMS)}
"""By what is trained together: the tokens, and the items where data has none."""
REFITS = (*_DEFAULTS, "squares")
"""What a refit may end with: training together what `_DEFAULTS` names, or nothing after its least squares."""
_LARGE = 2**26
"""Parameters from which on a language model is trained as a whole by default. Measured between 3 M and 39 M, block by block took less
time and recovered more; at 135 M it took four times as long and recovered half as much."""
_TRAINED_BYTES = 44
"""Bytes per trained number in float32: before, now, its gradient, two moments, the best so far and the best before, and its share of the
second moments of inputs and their roots."""


def refit_by_default(
    by: str | None, checkpoint: Checkpoint, sites: Sequence[Site], kind: str, tokens: int, device: str, *,
    heals: bool = False, continues: bool = False,
) -> str:  # fmt: skip
    """Return what ends a refit: the training of the "model" as a whole, that of each "block" alone, or "squares", least squares alone.

    What is not given is the model for language models that are large, and for the decoder of a model of speech, as far as there are data
    enough and memory for what is trained. It is the memory that there is, not what is free, so that a fold goes on in the way that it
    began. Where a healing follows (`heals`) it is each block, or squares if that healing `continues` the refit: by model, in one pass
    over at least as much data, the same training.

    Raises:
        UserError: an unknown `by`, or no memory for the model.
    """
    if by not in (None, *REFITS):
        raise UserError(f"--refit-by {by}: expected one of {', '.join(REFITS)}")
    if by is None and continues:
        return "squares"
    if by is None:
        size = max(max(checkpoint.tensors[site.tensor("o")].shape) for site in sites)
        enough = tokens >= NARROW * size and _as_a_whole(kind, checkpoint.num_parameters)
        whole = (enough or _hears(kind, sites)) and not heals
        return "model" if whole and _lacking(checkpoint, sites, device, total_memory) is None else "block"
    if by != "model" or (lacking := _lacking(checkpoint, sites, device)) is None:
        return by
    raise UserError(
        f"fold --refit-by model: expected memory for the model and {lacking:.1f} GiB of training, got less; give --refit-by block"
    )


def _as_a_whole(kind: str, num_parameters: int) -> bool:
    """Return whether data of this kind train a model of that size together by default."""
    return kind in ("text", "texts") and num_parameters >= _LARGE


def _hears(kind: str, sites: Sequence[Site]) -> bool:
    """Return whether what is folded is the decoder of a model of speech.

    It reads what the encoder heard, which stays as it is and runs once for both models, so that training it as a whole costs little more
    than block by block. With few recordings least squares have too few of its tokens, of which a training by the output uses every one.
    An encoder has many positions for each token, and would take the memory of all their activations.
    """
    return kind == "audio" and all(site.stack == "decoder" for site in sites)


def _lacking(
    checkpoint: Checkpoint, sites: Sequence[Site], device: str, memory: Callable[[str], int] | None = None
) -> float | None:
    """Return the GiB that training takes beside the model itself, activations not counted; None where memory holds both."""
    names = {site.tensor(role) for site in sites for role in site.weights}
    trained = sum(math.prod(checkpoint.tensors[name].shape) for name in names if name in checkpoint.tensors)
    extra = _TRAINED_BYTES * trained + answers.KEPT_BYTES
    dtype = stored_dtype(checkpoint.path)
    if torch.device(device).type == "cpu":  # on which many processors compute in float32
        dtype = torch.promote_types(dtype, torch.float32)
    return extra / 2**30 if exceeds_memory(checkpoint, dtype, device, extra=extra, memory=memory) else None


@dataclass(frozen=True, slots=True)
class Healing:
    """Training of the sites of a fold, after merge and refit, on the original's outputs."""

    by: str = "model"
    """"model": all sites together, by the model's output. "block": each alone, by its own, in the memory of one block."""
    tokens: int = 0
    """Tokens, or items, that the model or every block is trained on; 0 for no healing."""

    @classmethod
    def resolved(cls, by: str | None, tokens: int | None, kind: str, num_parameters: int) -> "Healing":
        """Return a healing; what is not given is the default for data of this kind and a model of that size.

        Raises:
            UserError: an unknown `by`.
        """
        if by is None:
            by = "model" if _as_a_whole(kind, num_parameters) else "block"
        if by not in _DEFAULTS:
            raise UserError(f"--heal-by {by}: expected one of {', '.join(_DEFAULTS)}")
        default, items = _DEFAULTS[by]
        return cls(by, tokens or items.get(kind, default))

    def check_memory(self, checkpoint: Checkpoint, sites: Sequence[Site], device: str) -> None:
        """Check that memory holds what is trained together, beside the model itself; activations are not counted.

        Raises:
            UserError: it does not.
        """
        if self and self.by == "model" and (lacking := _lacking(checkpoint, sites, device)) is not None:
            raise UserError(
                f"fold --heal: expected memory for the model and {lacking:.1f} GiB of training, got less; give --heal-by block, which "
                "trains one block at a time"
            )

    def __bool__(self) -> bool:
        return self.tokens > 0


@dataclass(frozen=True, slots=True)
class Fits:
    """What a call asks to be fitted after the merge; what it does not give is the default for its model and data."""

    refit: bool = True
    refit_by: str | None = None
    heal: bool = False
    heal_tokens: int | None = None
    heal_by: str | None = None

    def check(self) -> None:
        """Check that no option is given without what it is for.

        Raises:
            UserError: one is.
        """
        if not self.heal and (self.heal_tokens is not None or self.heal_by is not None):
            raise UserError(
                "fold: heal_tokens and heal_by go with heal; add it (--heal --heal-tokens N) or leave them out"
            )
        if not self.refit and self.refit_by is not None:
            raise UserError("fold: refit_by goes with refit; leave it or --no-refit out")

    def resolved(
        self, checkpoint: Checkpoint, sites: Sequence[Site], kind: str, tokens: int, device: str, *, more: bool
    ) -> tuple[str, Healing]:
        """Return what ends a refit, "" without one, and the healing, on data of this kind with so many tokens, of which there is `more`.

        Raises:
            UserError: something unknown, or no memory for it.
        """
        healing, together = Healing(), ""
        if self.heal:
            healing = Healing.resolved(self.heal_by, self.heal_tokens, kind, checkpoint.num_parameters)
            healing.check_memory(checkpoint, sites, device)
        if self.refit:
            enough = tokens <= healing.tokens if more else tokens == healing.tokens
            together = refit_by_default(
                self.refit_by, checkpoint, sites, kind, tokens, device,
                heals=bool(healing), continues=bool(healing) and healing.by == "model" and kind == "text" and enough,
            )  # fmt: skip
        return together, healing
