"""What calibration data reach: positions per input dim and per fitted parameter, the model's context, and its own kind of text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.plan import Plan
from ..core.stats import NARROW
from ..families.spec import Site
from ..stats_file import StatsFile

OTHER_KIND = 0.75
"""Nats of loss beyond the expected one from which a text is called another kind than the model's own. Text that three models know came
to 0.54 at most, English to 1.03 at least for two that know none; chance makes about 0.15 either way (docs/how-to/data.md)."""
SHORT, LONG = 4, 1024
"""Times that the model's context, or `LONG` tokens of it, may be longer than the calibration windows before that is said."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known of the calibration data of a fold; None where it was not measured, or is of no language model."""

    site: str | None = None
    """The site with the fewest positions for its size."""
    positions_per_dim: float = math.inf
    positions_per_parameter: float | None = None
    """There, equations of the refit for each number that it fits; None where nothing was refitted."""
    window: int | None = None
    context: int | None = None
    """Tokens that the model takes at once."""
    perplexity: float | None = None
    expected_perplexity: float | None = None
    """That of text which the model would write itself."""

    @property
    def excess(self) -> float:
        """The loss beyond the expected one, in nats; 0 if unknown."""
        if self.perplexity is None or self.expected_perplexity is None:
            return 0.0
        return math.log(self.perplexity) - math.log(self.expected_perplexity)

    def notes(self) -> list[str]:
        """Return what a user should know before trusting the fold."""
        found = []
        if self.positions_per_dim < NARROW:
            fitted = (
                ""
                if self.positions_per_parameter is None
                else "; refitted to so few, a fold may be worse than with --no-refit"
            )
            found.append(
                f"calibration is narrow: {self.positions_per_dim:.1f} positions per input dim at {self.site}, where {NARROW} are the "
                f"least that carry over to other data{fitted}; use more data, from every domain the fold will see"
            )
        if self.excess > OTHER_KIND:
            found.append(
                f"calibration text is of another kind than the model's own: its perplexity there is {self.perplexity:.3g}, where it "
                f"expects {self.expected_perplexity:.3g}; use text of the kind that the fold will see, or --calibration self"
            )
        if self.window is not None and self.context is not None and self.window * SHORT < min(self.context, LONG):
            found.append(
                f"calibration windows are short: {self.window:,} tokens, where the model takes {self.context:,}; what is farther apart was "
                "not measured; give a longer --context"
            )
        return found

    def line(self) -> str:
        """Return all of it in one line; an empty one where nothing is known."""
        parts = []
        if self.site is not None:
            parts.append(f"{self.positions_per_dim:.1f} positions per input dim at {self.site}, the fewest")
        if self.positions_per_parameter is not None:
            parts.append(f"{self.positions_per_parameter:.1f} per refitted parameter of an output dim")
        if self.window is not None and self.context is not None:
            parts.append(f"windows of {self.window:,} tokens of a context of {self.context:,}")
        if self.perplexity is not None and self.expected_perplexity is not None:
            parts.append(f"perplexity {self.perplexity:.3g} where the model expects {self.expected_perplexity:.3g}")
        return "; ".join(parts)


def reach_of(
    sites: Sequence[Site],
    plan: Plan,
    statistics: StatsFile | None,
    facts: Mapping[str, str],
    context: int | None,
    *,
    refitted: bool,
) -> Reach:
    """Return the reach of the data that `statistics` were measured on, or that `facts` describe."""
    found = reach_of_text(facts, context)
    if statistics is None or not (measured := [site for site in sites if site.name in statistics]):
        return found
    ratio, site = min(((statistics.positions_per_dim(site.name), site) for site in measured), key=lambda pair: pair[0])
    return Reach(
        site.name,
        ratio,
        ratio * _dims(site, statistics) / _parameters(site, plan, ratio) if refitted else None,
        found.window,
        found.context,
        found.perplexity,
        found.expected_perplexity,
    )


def reach_of_text(facts: Mapping[str, str], context: int | None) -> Reach:
    """Return what the facts of calibration text say; nothing of other data."""
    if facts.get("kind") != "text":
        return Reach()
    window = facts.get("context", "")
    return Reach(
        window=int(window) if window.isdecimal() and len(window) < 20 else None,
        context=context,
        perplexity=_perplexity(facts, "perplexity"),
        expected_perplexity=_perplexity(facts, "expected_perplexity"),
    )


def _dims(site: Site, statistics: StatsFile) -> int:
    shape = statistics.shape(site.name, "second")
    assert shape is not None, "the file has the second moment of every site"
    return shape[0] - 1


def _parameters(site: Site, plan: Plan, positions_per_dim: float) -> int:
    """Return the numbers that a refit fits for each output dim: of W_o, W_v and, where there are positions enough, W_q."""
    planned = plan.sites[site.name]
    queries, values = site.num_heads * planned.head_dim, planned.groups.num_kv_heads * planned.head_dim
    return (2 if positions_per_dim >= NARROW else 1) * queries + values


def _perplexity(facts: Mapping[str, str], name: str) -> float | None:
    """Return a perplexity that a file records; None where it is none."""
    try:
        value = float(facts[name])
    except (KeyError, ValueError):
        return None
    return value if 0 < value < math.inf else None
