"""Which K/V heads share one, how they become one, and what that is predicted to lose: the plan, a file of its own."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError
from .groups import Groups
from .heads import KeyFreedom
from .predict import SiteError

FORMAT = "headfold-plan-1"


class Named(Protocol):
    """What a plan needs to know of a site."""

    @property
    def name(self) -> str: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def query_order(self) -> str: ...
    @property
    def stack(self) -> str: ...
    @property
    def key_freedom(self) -> KeyFreedom: ...
    @property
    def weights(self) -> Mapping[str, str]: ...
    @property
    def stock_gqa(self) -> bool: ...
    @property
    def fixed_head_dim(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What happens to one site. Errors are None where there were no statistics to predict them from."""

    groups: Groups
    """Source K/V head → new K/V head."""
    merge: str
    """Method with its options, as on the command line."""
    head_dim: int
    """Width of a new K/V head, and of the queries that read it: the source's, or a multiple of it."""
    error: SiteError | None = None
    """Predicted: K in logit² before the softmax scale, V in output², per token, summed over query heads."""
    energy: SiteError | None = None
    """The same two of the original K and V: the scale of `error`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One `SitePlan` per site, with the fingerprints of what it was made from."""

    sites: Mapping[str, SitePlan]
    group: str
    source: str
    """Fingerprint of the source checkpoint."""
    seed: int = 0
    calibration: Mapping[str, str] = field(default_factory=dict)
    """What the statistics were measured on (source, tokens, fingerprint); empty without."""

    @property
    def num_kv_heads(self) -> dict[str, int]:
        """K/V heads of the folded checkpoint, by site."""
        return {name: site.groups.num_kv_heads for name, site in self.sites.items()}

    def head_dim_multiples(self, sites: Iterable[Named]) -> dict[str, int]:
        """Widths of their new K/V heads in heads of the source, by name."""
        return {site.name: self.sites[site.name].head_dim // site.head_dim for site in sites}

    def to_json(self) -> dict[str, Any]:
        rows = {
            name: {
                "kv_of_source_head": list(site.groups.group_of_head),
                "merge": site.merge,
                "head_dim": site.head_dim,
                "error": site.error and asdict(site.error),
                "energy": site.energy and asdict(site.energy),
            }
            for name, site in self.sites.items()
        }
        head = {"format": FORMAT, "source": self.source, "seed": self.seed, "group": self.group}
        return {**head, "calibration": dict(self.calibration), "sites": rows}

    @classmethod
    def from_json(cls, data: Any, where: str = "plan.json") -> "Plan":
        """Raises: UserError where the file is not a plan of this version."""
        try:
            if data["format"] != FORMAT:
                raise UserError(f"{where}: format is {data['format']!r}, expected {FORMAT!r}; make the plan again")
            sites = {name: _site_plan(row) for name, row in data["sites"].items()}
            return cls(sites, data["group"], data["source"], data["seed"], dict(data["calibration"].items()))
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{where}: not a headfold plan ({error!r}); make one with headfold plan") from error

    @classmethod
    def load(cls, path: Path) -> "Plan":
        try:
            return cls.from_json(json.loads(path.read_text()), str(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not JSON ({error}); make a plan with headfold plan") from error

    def check_source(self, fingerprint: str, sites: Sequence[Named]) -> None:
        """Refuse to apply a plan to another checkpoint than the one it was made for, or groups that it cannot have."""
        if self.source != fingerprint:
            raise UserError("plan: made for another checkpoint (fingerprints differ); make it again with headfold plan")
        if odd := sorted(self.sites.keys() ^ {site.name for site in sites}):
            word = "an attention that the checkpoint has not" if odd[0] in self.sites else "no entry"
            raise UserError(
                f"plan: {odd[0]}: expected one entry per attention, got {word}; make it again with headfold plan"
            )
        stacks: dict[str, Groups] = {}
        for site in sites:
            planned = self.sites[site.name]
            reason = _misfit(planned, site, stacks.get(site.stack, planned.groups))
            if reason:
                raise UserError(f"plan: {site.name}: {reason}")
            if site.query_order == "stack":
                stacks.setdefault(site.stack, planned.groups)


def head_dim_refusal(site: Named, head_dim_multiple: int) -> str | None:
    """Why the site cannot have heads that many times as wide as the source's, or gains nothing from them; None where it may."""
    if site.key_freedom.normed:
        return "its keys pass a norm per head, so a wide head is no better than several"
    if site.fixed_head_dim:
        return "its class takes heads of the source's width alone"
    if "qkv" in site.weights and site.stock_gqa:
        return "q, k and v are one tensor on disk, which has no wide form"
    if head_dim_multiple > site.num_kv_heads:
        return f"expected at most {site.num_kv_heads}, its count of K/V heads"
    return None


def _misfit(planned: SitePlan, site: Named, of_stack: Groups) -> str | None:
    """Why a site cannot be folded so, None where it can."""
    groups = planned.groups
    if groups.num_heads != site.num_kv_heads:
        return f"kv_of_source_head: expected {site.num_kv_heads} entries, one per K/V head, got {groups.num_heads}"
    if planned.head_dim < 1 or planned.head_dim % site.head_dim:
        return f"head_dim: expected the source's {site.head_dim} or a multiple, got {planned.head_dim}"
    if planned.head_dim != site.head_dim and (reason := head_dim_refusal(site, planned.head_dim // site.head_dim)):
        return f"head_dim: expected the source's {site.head_dim}, got {planned.head_dim}: {reason}"
    if site.query_order == "fixed" and not groups.is_ordered:
        return "its heads' order is fixed (a slope each), so only neighbours can share; make kv_of_source_head ascend"
    if site.query_order == "stack" and groups != of_stack:
        return (
            "its stack shares one position bias, so all its sites need the same groups; give them one kv_of_source_head"
        )
    return None


def _site_plan(row: Mapping[str, Any]) -> SitePlan:
    error, energy = (_site_error(row[name]) for name in ("error", "energy"))
    if not isinstance(row["merge"], str) or type(row["head_dim"]) is not int:
        raise TypeError("merge is a text and head_dim a whole number")
    return SitePlan(Groups(tuple(row["kv_of_source_head"])), row["merge"], row["head_dim"], error, energy)


def _site_error(row: Mapping[str, Any] | None) -> SiteError | None:
    if row and not all(isinstance(number, float | int) for number in row.values()):
        raise TypeError("errors are numbers")
    return SiteError(**row) if row else None
