"""The result of a fold."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.plan import Plan
from ..evaluate.verify import Verification
from .provenance import Fitting
from .serving_cost import ServingCost
from .source import Source


@dataclass(frozen=True, slots=True)
class FoldResult:
    """The result of a fold: the output, its costs, and what was measured on the way."""

    out: Path | None
    """The directory that was written; None where the fold is in memory."""
    base_model: str
    """Name of the model as the user wrote it."""
    family: str
    num_heads: int
    num_kv_heads_before: int
    num_kv_heads_after: int
    """K/V heads of the site that keeps most; `num_kv_heads_least` of the one that keeps fewest."""
    num_kv_heads_least: int
    before: ServingCost
    after: ServingCost
    plan: Plan
    refitted: bool
    refit_by: str
    """What a refit trained together at its end: all sites ("model"), one at a time ("block"), or none ("squares"); "" without a refit."""
    healed: int
    """Tokens, or items, that the model or every block was trained on; 0 for none."""
    healed_by: str
    """What was trained together: all sites ("model"), one at a time ("block"), or nothing ("")."""
    verification: Verification | None
    notes: list[str]
    seconds: dict[str, float]
    """Seconds by stage."""
    estimated_seconds: dict[str, float]
    """Seconds by stage as they were estimated before; what was not to be done, or could not be counted, is left out."""

    @classmethod
    def of(
        cls,
        out: Path,
        source: Source,
        plan: Plan,
        costs: tuple[ServingCost, ServingCost],
        fitting: Fitting,
        verification: Verification | None,
        notes: list[str],
        seconds: dict[str, float],
        estimated_seconds: dict[str, float],
    ) -> "FoldResult":
        """Return the result of a fold that was written."""
        counts = plan.num_kv_heads.values()
        return cls(
            out=out,
            base_model=source.name,
            family=source.config["model_type"],
            num_heads=max(site.num_heads for site in source.sites),
            num_kv_heads_before=source.num_kv_heads,
            num_kv_heads_after=max(counts),
            num_kv_heads_least=min(counts),
            before=costs[0],
            after=costs[1],
            plan=plan,
            refitted=bool(fitting.refit_by),
            refit_by=fitting.refit_by,
            healed=fitting.healing.tokens,
            healed_by=fitting.healing.by if fitting.healing else "",
            verification=verification,
            notes=notes,
            seconds=seconds,
            estimated_seconds=estimated_seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        facts = {name: getattr(self, name) for name in self.__slots__}
        costs: dict[str, Any] = {"before": asdict(self.before), "after": asdict(self.after)}
        costs |= {"kv_bytes_before": self.kv_bytes_before, "kv_bytes_after": self.kv_bytes_after}
        verification = None if self.verification is None else asdict(self.verification)
        return {
            **facts,
            **costs,
            "out": self.out and str(self.out),
            "plan": self.plan.to_json(),
            "verification": verification,
        }

    @property
    def kv_bytes_before(self) -> int:
        """K/V bytes of the source per token, over all layers, in the checkpoint's dtype."""
        return self.before.kv_bytes_per_token

    @property
    def kv_bytes_after(self) -> int:
        """K/V bytes of the fold per token, over all layers, in the checkpoint's dtype."""
        return self.after.kv_bytes_per_token
