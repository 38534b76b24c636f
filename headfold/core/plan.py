"""The plan, a file of its own: which K/V heads share one, how they are merged, and the predicted errors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .errors import UserError
from .groups import Groups
from .heads import KeyFreedom
from .json_input import read_object
from .predict import SiteError

FORMAT = "headfold-plan-1"


@runtime_checkable
class PlannedSite(Protocol):
    """The attributes of a site that a plan reads."""

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
    """The plan of one site. Errors are None without the statistics that they are predicted from."""

    groups: Groups
    """Maps each K/V head of the source to its new K/V head."""
    merge: str
    """The merge with its options, as on the command line."""
    head_dim: int
    """Dims of a new K/V head and of the queries that read it: the source's head_dim, or a multiple of it."""
    error: SiteError | None = None
    """Predicted error: K in logit² before the softmax scale, V in output², per token, summed over query heads."""
    energy: SiteError | None = None
    """The energy of the original K and V in the same units, the scale of `error`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One `SitePlan` per site, with the fingerprints of the checkpoint and the data that it was made from."""

    sites: Mapping[str, SitePlan]
    group: str
    source: str
    """Fingerprint of the source checkpoint."""
    seed: int = 0
    calibration: Mapping[str, str] = field(default_factory=dict)
    """Facts of the data that the statistics were measured on (source, tokens, fingerprint); empty without statistics."""
    predicted_loss_increase: float | None = None
    """The sum of what the sites were measured to lose alone (`evaluate.sensitivity`); None where no site was measured."""
    quantised_cache: bool = False
    """Whether K and V are rotated for a quantised cache at the end (`core.quantised_cache`)."""

    @property
    def num_kv_heads(self) -> dict[str, int]:
        """The number of K/V heads of each site after folding, by name."""
        return {name: site.groups.num_kv_heads for name, site in self.sites.items()}

    def head_dim_multiples(self, sites: Iterable[PlannedSite]) -> dict[str, int]:
        """Return how many times the source's head_dim the new K/V heads of each site have, by name."""
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
        loss = self.predicted_loss_increase
        also: dict[str, Any] = {} if loss is None else {"predicted_loss_increase": loss}
        also |= {"quantised_cache": True} if self.quantised_cache else {}
        return {**head, "calibration": dict(self.calibration), **also, "sites": rows}

    @classmethod
    def from_json(cls, data: Any, where: str = "plan.json") -> "Plan":
        """Return the plan of parsed JSON; `where` names it in messages.

        Raises:
            UserError: it is not a plan of this version.
        """
        try:
            if data["format"] != FORMAT:
                raise UserError(
                    f"{where}: expected the format {FORMAT!r}, got {data['format']!r:.60}; make the plan again"
                )
            sites = {name: _site_plan(row) for name, row in data["sites"].items()}
            facts = dict(data["calibration"].items())
            if not all(isinstance(text, str) for text in (data["group"], data["source"], *facts, *facts.values())):
                raise TypeError("group, source and the facts of the calibration must be texts")
            if type(data["seed"]) is not int:
                raise TypeError("seed must be an integer")
            loss = data.get("predicted_loss_increase")
            if loss is not None and not (type(loss) in (float, int) and 0 <= loss < math.inf):
                raise TypeError("predicted_loss_increase must be a finite number of at least 0")
            if type(rotated := data.get("quantised_cache", False)) is not bool:
                raise TypeError("quantised_cache must be true or false")
            return cls(sites, data["group"], data["source"], data["seed"], facts, loss, rotated)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: expected a headfold plan, got something else ({error!r}); make one with headfold plan"
            ) from error

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan.json.

        Raises:
            UserError: there is no such file, it is not JSON, or not a plan of this version.
        """
        return cls.from_json(read_object(path, "make a plan with headfold plan"), str(path))

    def check_source(self, fingerprint: str, sites: Sequence[PlannedSite], where: str = "plan.json") -> None:
        """Refuse to apply the plan to a checkpoint that it was not made for, or to sites that cannot be folded so.

        Raises:
            UserError: names the site and the reason.
        """
        if self.source != fingerprint:
            raise UserError(
                f"{where}: expected a plan of this checkpoint, got one of another (fingerprints differ); make it again with headfold plan"
            )
        if odd := sorted(self.sites.keys() ^ {site.name for site in sites}):
            what = "is not in this checkpoint" if odd[0] in self.sites else "is not in the plan"
            raise UserError(f"{where}: site {odd[0]} {what}; make a new plan with headfold plan")
        stacks: dict[str, Groups] = {}
        for site in sites:
            planned = self.sites[site.name]
            reason = _refusal(planned, site, stacks.get(site.stack, planned.groups))
            if reason:
                raise UserError(f"{where}: site {site.name}: {reason}")
            if site.query_order == "stack":
                stacks.setdefault(site.stack, planned.groups)


def head_dim_refusal(site: PlannedSite, head_dim_multiple: int) -> str | None:
    """Return why the site cannot have heads of so many times the source's head_dim, or gains nothing by them; None if it can."""
    if site.key_freedom.normed:
        return "its keys pass a norm, so one head with more dims is no better than several"
    if site.fixed_head_dim:
        return "its class requires the source's head_dim"
    if "qkv" in site.weights and site.stock_gqa:
        return "q, k and v are one tensor on disk, which cannot hold heads of another head_dim"
    if head_dim_multiple > site.num_kv_heads:
        return f"expected at most {site.num_kv_heads}, its number of K/V heads"
    return None


def _refusal(planned: SitePlan, site: PlannedSite, of_stack: Groups) -> str | None:
    """Return why a site cannot be folded so, None if it can."""
    groups = planned.groups
    if groups.num_heads != site.num_kv_heads:
        return f"kv_of_source_head: expected {site.num_kv_heads} entries, one per K/V head, got {groups.num_heads}"
    if planned.head_dim < 1 or planned.head_dim % site.head_dim:
        return f"head_dim: expected the source's {site.head_dim} or a multiple of it, got {planned.head_dim}"
    if planned.head_dim != site.head_dim and (reason := head_dim_refusal(site, planned.head_dim // site.head_dim)):
        return f"head_dim: expected the source's {site.head_dim}, got {planned.head_dim}: {reason}"
    if site.key_freedom.norm_spans_heads and not groups.is_even:
        return "one norm spans all its K heads, in which each should count alike; make groups of one size"
    if site.query_order == "fixed" and not groups.is_ordered:
        return "the order of its heads is fixed (ALiBi slopes), so only neighbours can share a K/V head; make kv_of_source_head ascend"
    if site.query_order == "stack" and groups != of_stack:
        return "the sites of its stack share one position bias and need the same groups; give all of them the same kv_of_source_head"
    return None


def _site_plan(row: Mapping[str, Any]) -> SitePlan:
    error, energy = (_site_error(row[name]) for name in ("error", "energy"))
    if energy is not None and min(energy.key, energy.value) <= 0:
        raise TypeError("the energy of K and V, which errors are divided by, must be positive")
    if not isinstance(row["merge"], str) or type(row["head_dim"]) is not int:
        raise TypeError("merge must be a string and head_dim an integer")
    labels = row["kv_of_source_head"]
    whole = isinstance(labels, list) and labels and all(type(label) is int for label in labels)
    if not whole or {*labels} != {*range(len({*labels}))}:
        raise TypeError("kv_of_source_head must be a list that names every new K/V head from 0 on")
    return SitePlan(Groups(tuple(labels)), row["merge"], row["head_dim"], error, energy)


def _site_error(row: Mapping[str, Any] | None) -> SiteError | None:
    if row and not all(type(number) in (float, int) and math.isfinite(number) for number in row.values()):
        raise TypeError("errors must be finite numbers")
    return SiteError(**row) if row else None
