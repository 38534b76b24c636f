"""How a fold is healed: what is trained together, and on how much data."""

from dataclasses import dataclass

from ..core.errors import UserError
from ..refine import distill, heal

_DEFAULTS = {"model": (distill.TOKENS, distill.ITEMS), "block": (heal.TOKENS, heal.ITEMS)}
"""By what is trained together: the tokens, and the items where data has none."""


@dataclass(frozen=True, slots=True)
class Healing:
    """Training of the sites of a fold, after merge and refit, on the original's outputs."""

    by: str = "model"
    """"model": all sites together, by the model's output. "block": each alone, by its own, in the memory of one block."""
    tokens: int = 0
    """Tokens, or items, that the model or every block is trained on; 0 for no healing."""

    @classmethod
    def resolved(cls, by: str, tokens: int | None, kind: str) -> "Healing":
        """Return a healing with the default amount of data of this kind, if none is given.

        Raises:
            UserError: an unknown `by`.
        """
        if by not in _DEFAULTS:
            raise UserError(f"--heal-by {by}: expected one of {', '.join(_DEFAULTS)}")
        default, items = _DEFAULTS[by]
        return cls(by, tokens or items.get(kind, default))

    def __bool__(self) -> bool:
        return self.tokens > 0
