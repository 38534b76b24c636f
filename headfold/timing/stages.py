"""How many operations the stages of a fold take, and how long a machine takes for them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from ..core.query_sample import QUERY_STEPS, num_sampled_queries
from ..core.stats import NARROW
from ..parallel import num_processes
from .arithmetic import Arithmetic
from .machine import product_rate

CALIBRATE, REFIT, HEAL, DISTILL = 1.6, 3, 6, 5
"""What a stage takes in forward passes: calibration in those of the blocks, refit and healing by block in those of the attention, after
one of the blocks, healing by model in those of the model with its head. These and the next are measured on a model of 135 M parameters.
"""
LOGIT = 1000
"""Operations in float32 that a logit takes, softmax and all, while W_q is refitted."""
SAMPLE, CACHED = 1.6, 190
"""Forward passes of sampling text that the model writes itself, and operations that an element of its K/V cache is worth at every
token.
"""
PLAN = 24
"""Operations of planning a site, over the cube of its hidden size."""
SLOW, MEASURED_FROM = 1e10, 1e11
"""Operations per second of a slow core; the rate of this machine is measured for at least so many operations."""
DISK = 3e8
"""Bytes per second at which a checkpoint is written or opened."""
STAGES = ("calibrate", "plan", "refit", "heal", "write", "verify")


@dataclass(frozen=True, slots=True)
class CalibrationPass:
    """One forward pass over the calibration data."""

    once: Arithmetic
    """Of one item."""
    items: float
    hidden_size: int
    cached: float | None = None
    """Elements of K and V before a token, summed over the tokens of an item, of text that the model writes; None of other data."""
    drawn: bool = False
    """Whether such text is written already."""


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of one process in a stage."""

    own: float = 0.0
    """In the dtype that the original computes in, where it runs."""
    precise: float = 0.0
    """There, but in float32."""
    on_cpu: float = 0.0
    """On the CPU, in float32."""


def fitting_operations(
    data: CalibrationPass,
    *,
    calibrates: bool,
    refits: Collection[str],
    heals: Collection[str],
    healed: float,
    heals_together: bool = False,
    refit_by: str = "block",
    records: bool = True,
    shares_encoder: bool = False,
) -> dict[str, Operations]:
    """Return by stage the operations of calibrating, if that is done, and of refitting and healing the sites of these names.

    A refit records what the blocks do in a pass of its own if `records`. At its end it trains each block on all items once, or the
    model, or nothing, as `refit_by` says ("block", "model", "squares").
    A site, or with `heals_together` the model, is healed on `healed` items, which are drawn anew where the model does not write them.
    `shares_encoder` says that an encoder stays as it is: it runs once where the model is trained.
    """
    once, shared, found = data.once, num_processes(), dict[str, Operations]()
    untrained = once.encoder if shares_encoder else 0.0
    distilled = untrained + DISTILL * (once.blocks - untrained + once.head)
    if calibrates:
        sampling = 0.0
        if data.cached is not None and not data.drawn:
            sampling = SAMPLE * (once.blocks + once.head) + CACHED * data.cached
        found["calibrate"] = Operations(data.items * (CALIBRATE * once.blocks / shared + sampling))
    if refits:
        precise = sum(REFIT * data.items * once.sites[name] + _of_queries(data, name) for name in refits)
        own = data.items * once.blocks if records else 0.0
        if refit_by == "model":
            own += data.items * distilled
        elif refit_by == "block":
            precise += sum(HEAL * data.items * once.sites[name] for name in refits)
        found["refit"] = Operations(own / shared, precise / shared)
    if heals and heals_together:
        found["heal"] = Operations(healed * distilled / shared)
    elif heals:
        drawn = max(data.items, healed) if data.cached is None else data.items
        trained = HEAL * healed * sum(once.sites[name] for name in heals)
        found["heal"] = Operations((drawn * once.blocks + trained) / shared)
    return found


def _of_queries(data: CalibrationPass, site: str) -> float:
    """Return the operations of refitting W_q of a site, which sees a sample of the queries."""
    queries = data.items * data.once.queries[site]
    if queries < NARROW * data.hidden_size:
        return 0.0
    slope, curvature, _ = (min(queries, wanted) for wanted in num_sampled_queries(queries, data.hidden_size))
    return LOGIT * data.once.logits[site] * (slope + QUERY_STEPS * curvature)


def planning_operations(hidden_sizes: Collection[int]) -> Operations:
    """Return the operations of a plan that uses statistics, from the hidden size of each site."""
    return Operations(on_cpu=PLAN * float(sum(size**3 for size in hidden_sizes)))


def seconds_of(
    stages: Mapping[str, Operations], size: int, num_bytes: int, device: str, dtype: Callable[[], torch.dtype]
) -> dict[str, float]:
    """Return the seconds of these stages and of writing `num_bytes` of weights, in the order of a fold.

    The rates of this machine are measured, on matrices of about `size`, where a slow core would take a while; `dtype`, that of the
    original, is asked for then.
    """
    is_long = sum(work.own + work.precise + work.on_cpu for work in stages.values()) >= MEASURED_FROM

    def seconds(number: float, place: str, dtype: Callable[[], torch.dtype]) -> float:
        return number / (product_rate(size, place, dtype()) if is_long and number else SLOW)

    def float32() -> torch.dtype:
        return torch.float32

    transfer = num_bytes / DISK
    runs = next((stage for stage in STAGES if stage in stages and stages[stage].own), "")
    found = {runs: transfer, "write": transfer, "verify": 2 * transfer}
    for stage, work in stages.items():
        own, precise = seconds(work.own, device, dtype), seconds(work.precise, device, float32)
        found[stage] = found.get(stage, 0) + own + precise + seconds(work.on_cpu, "cpu", float32)
    return {stage: round(found[stage], 3) for stage in STAGES if stage in stages or stage == "write"}
