"""Whether a difference between models is more than chance: a paired bootstrap over the units that all models were measured on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from ..core.errors import UserError

RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 2**22
"""Number of drawn unit counts held in memory at once."""
Values = Float[np.ndarray, "..."] | np.floating[Any]
"""Metrics of several rows of sums; numpy makes a scalar of the metric of one."""


@runtime_checkable
class Resampled(Protocol):
    """A metric of one model that can be computed for all its units and for any resample of them."""

    @property
    def metric(self) -> str: ...

    @property
    def unit(self) -> str:
        """The name of the units, in the plural."""
        ...

    @property
    def lower_is_better(self) -> bool: ...

    def __len__(self) -> int: ...

    @property
    def total(self) -> float:
        """The metric over all units."""
        ...

    def resampled(self, counts: Int[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        """Return the metric of each resample, in which every unit occurs as often as `counts` says."""
        ...


def ratio(sums: Float[np.ndarray, "... 2"]) -> Values:
    """Return the first sum over the second: loss over tokens, or a sum of values over items."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The sums over units that a metric is made of, and the function from sums to the metric.

    `sums` is (unit, statistic) in float64; the metric of any collection of units is `value` of the sum of their rows.
    """

    metric: str
    unit: str
    sums: Float[np.ndarray, "unit statistic"]
    value: Callable[[Float[np.ndarray, "... statistic"]], Values] = ratio
    lower_is_better: bool = False

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def total(self) -> float:
        return float(self.value(self.sums.sum(0)))

    def resampled(self, counts: Int[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        return np.asarray(self.value(counts.astype(np.float64) @ self.sums))


def mean_of(metric: str, unit: str, values: Float[np.ndarray, " unit"], *, lower_is_better: bool = False) -> Units:
    """Return units whose metric is the mean of one number per unit."""
    sums = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return Units(metric=metric, unit=unit, sums=sums, lower_is_better=lower_is_better)


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of a metric to the first model's, with its percentile interval and its p-value.

    `p` is two-sided and agrees with the interval: it is below 1 - `LEVEL` where the interval excludes zero (to one draw).
    sacrebleu's paired bootstrap is one-sided, so its p is about half as large. All fields except `value` are NaN where the metric
    of a resample is undefined.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def is_distinguishable(self) -> bool:
        return self.low > 0 or self.high < 0


def differences(
    models: Sequence[Resampled], *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> list[Difference]:
    """Return the difference of each later model's metric to the first model's, with its interval.

    Units are drawn with replacement, as many as there are, and every model is measured on the same draw, so that units that are
    hard for all models cancel out. Koehn (2004), Statistical Significance Tests for Machine Translation Evaluation, section 4,
    counts how often one system wins; here the interval is made of percentiles of the difference (Efron & Tibshirani 1993, section
    13.3), and p of the same draws. Units are treated as independent: neighbouring windows of one document are not quite, which
    makes the interval a little too narrow.

    Raises:
        UserError: fewer than two units.
    """
    first, *others = models
    assert all(len(other) == len(first) for other in others), [len(model) for model in models]
    if len(first) < 2:
        raise UserError(
            f"--compare: expected at least 2 {first.unit} to draw from, got {len(first)}; give more data, or a shorter --context"
        )
    blocks = [[model.resampled(counts) for model in models] for counts in draws(len(first), resamples, seed)]
    values = [np.concatenate(block) for block in zip(*blocks, strict=True)]
    pairs = zip(others, values[1:], strict=True)
    return [_difference(other.total - first.total, drawn - values[0], level) for other, drawn in pairs]


def interval(
    units: Resampled, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Return the percentile interval of one model's metric, from the same draws as `differences`; NaN where a resample has no value."""
    drawn = np.concatenate([units.resampled(counts) for counts in draws(len(units), resamples, seed)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draws(num_units: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "resample unit"]]:
    """Yield how often each unit occurs in each of the resamples, one block of resamples at a time."""
    generator, block = np.random.default_rng(seed), max(1, BLOCK // num_units)
    for start in range(0, resamples, block):
        size = (min(block, resamples - start), num_units)
        drawn = generator.integers(num_units, size=size)
        yield np.stack([np.bincount(row, minlength=num_units) for row in drawn])


def _difference(value: float, drawn: Float[np.ndarray, " resample"], level: float) -> Difference:
    if not np.isfinite(drawn).all():
        return Difference(float(value), *[float("nan")] * 3)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    # One more on either side: no number of draws shows that something never happens.
    rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Difference(float(value), float(low), float(high), min(1.0, float(2 * (rarer + 1) / (len(drawn) + 1))))
