"""The result of a fold to MLA."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluate.verify import Verification
from .target import Shape


@dataclass(frozen=True, slots=True)
class LatentResult:
    """The output of a fold to MLA, its cache, and what was measured on the way."""

    out: Path | None
    base_model: str
    family: str
    num_heads: int
    num_kv_heads_before: int
    shape: Shape
    kv_bytes_before: int
    """K/V bytes of the source per token, over all layers, in the checkpoint's dtype."""
    kv_bytes_after: int
    """Bytes of latents and rotary keys per token."""
    site_errors: dict[str, float]
    """Predicted error by site, before the refit, as a share of the energy that keys and values have for the output."""
    refitted: bool
    verification: Verification | None
    notes: list[str]
    seconds: dict[str, float]
    """Seconds by stage."""

    @property
    def num_kv_heads_after(self) -> int:
        """K/V heads in the cache: the latent is one, which all query heads read."""
        return 1

    num_kv_heads_least = num_kv_heads_after

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        facts = {name: getattr(self, name) for name in self.__slots__}
        shape = asdict(self.shape)
        verification = None if self.verification is None else asdict(self.verification)
        return {**facts, "out": self.out and str(self.out), "shape": shape, "verification": verification}
