"""How a fold is healed: what is trained together, and on how much data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..families.spec import Site
from ..hf_models import exceeds_memory, stored_dtype
from ..refine import distill, heal

_DEFAULTS = {"model": (distill.TOKENS, distill.ITEMS), "block": (heal.TOKENS, heal.ITEMS)}
"""By what is trained together: the tokens, and the items where data has none."""
_LARGE = 2**26
"""Parameters from which on a language model is trained as a whole by default. Measured between 3 M and 39 M, block by block took less
time and recovered more; at 135 M it took four times as long and recovered half as much."""
_TRAINED_BYTES = 28
"""Bytes per trained number in float32: before, now, its gradient, two moments, the best so far and the best before."""


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
            by = "model" if kind in ("text", "texts") and num_parameters >= _LARGE else "block"
        if by not in _DEFAULTS:
            raise UserError(f"--heal-by {by}: expected one of {', '.join(_DEFAULTS)}")
        default, items = _DEFAULTS[by]
        return cls(by, tokens or items.get(kind, default))

    def check_memory(self, checkpoint: Checkpoint, sites: Sequence[Site], device: str) -> None:
        """Check that memory holds what is trained together, beside the model itself; activations are not counted.

        Raises:
            UserError: it does not.
        """
        if not self or self.by != "model":
            return
        names = {site.tensor(role) for site in sites for role in site.weights}
        trained = sum(math.prod(checkpoint.tensors[name].shape) for name in names if name in checkpoint.tensors)
        if exceeds_memory(checkpoint, stored_dtype(checkpoint.path), device, extra=_TRAINED_BYTES * trained):
            raise UserError(
                f"fold --heal: expected memory for the model and {_TRAINED_BYTES * trained / 2**30:.1f} GiB of training, got less; give "
                "--heal-by block, which trains one block at a time"
            )

    def __bool__(self) -> bool:
        return self.tokens > 0
